"""Train the debug model in many ways, and write docs/design/converging.md's table and picture.

    python scripts/make_converging.py [--folder outputs/converging] [--again NAME] [--page-only]

About 20 minutes on two cores. Runs that are finished are not run again, so that it may be stopped
and started at any time; `--again` repeats one of them, `--page-only` writes the page with what is
there. The picture needs matplotlib, which nothing else here does: pip install matplotlib
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchtitan import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design" / "converging.md"
PICTURE = ROOT / "docs" / "images" / "converging.png"
BEGIN, END = "<!-- scripts/make_converging.py writes from here -->", "<!-- to here -->"
CONFIG = ROOT / "train_configs" / "debug_model.toml"
STEPS = 500
BATCH = 4
SMOOTHED = 25
"""Steps that a point of a curve, and a loss at the end, is the mean of."""

COMMON = (
    f"--training.steps={STEPS}",
    f"--training.global_batch_size={BATCH}",
    "--training.seq_len=32",
    # At the file's 3e-3 such small batches are unstable: rounding grows tenfold in eight steps.
    "--optimizer.lr=1e-3",
    "--lr_scheduler.warmup_steps=50",
    "--checkpoint.enable=false",
    "--metrics.enable_tensorboard=false",
    "--metrics.log_freq=1",
)


@dataclass(frozen=True)
class Leg:
    """Processes that train until they are killed after a step, or to the end."""

    processes: int = 1
    arguments: tuple[str, ...] = ()
    killed_after: int | None = None


@dataclass(frozen=True)
class Run:
    name: str
    group: str
    label: str
    legs: tuple[Leg, ...]


def _degree(kind: str, number: int = 2) -> str:
    return f"--parallelism.{kind}_degree={number}"


def _local(size: int) -> str:
    return f"--training.local_batch_size={size}"


ALONE = Leg(1, (_local(BATCH),))
FSDP = Leg(2, (_local(2),))
TENSOR = Leg(2, (_local(BATCH), _degree("tensor_parallel")))
PIPELINE = Leg(2, (_local(BATCH), _degree("pipeline_parallel")))


def _also(leg: Leg, *arguments: str, killed_after: int | None = None) -> Leg:
    return replace(leg, arguments=(*leg.arguments, *arguments), killed_after=killed_after)


def _killed(legs: Sequence[Leg], *arguments: str) -> tuple[Leg, ...]:
    """Each leg but the last is killed, after as many steps as the others, and a few."""
    saved = ("--checkpoint.enable=true", *arguments)
    after = [STEPS * n // len(legs) + 7 for n in range(1, len(legs))]
    return tuple(_also(leg, *saved, killed_after=n) for leg, n in zip(legs, [*after, None]))


def _computing(dtype: str, *also: str) -> tuple[str, ...]:
    return (f"--training.mixed_precision_param={dtype}", *also)


MESH, PRECISION, CHECKPOINT = "meshes", "precision", "checkpoints"
_FLOAT64 = ("--training.dtype=float64", "--training.mixed_precision_reduce=float64")
_MODES = "--checkpoint.interval=50", "--checkpoint.async_mode=async"
RUNS = (
    Run("reference", MESH, "one process, float32", (ALONE,)),
    Run("fsdp", MESH, "FSDP 2", (FSDP,)),
    Run(
        "hsdp",
        MESH,
        "HSDP 2 x 2",
        (Leg(4, (_local(1), _degree("data_parallel_replicate"))),),
    ),
    Run("tp", MESH, "tensor parallel 2", (TENSOR,)),
    Run("cp", MESH, "context parallel 2", (Leg(2, (_local(BATCH), _degree("context_parallel"))),)),
    Run("pp", MESH, "pipeline 2, 1F1B", (PIPELINE,)),
    Run("seed", MESH, "one process, another seed", (_also(ALONE, "--debug.seed=1"),)),
    Run("float64", PRECISION, "all in float64", (_also(ALONE, *_computing("float64", *_FLOAT64)),)),
    Run("bfloat16", PRECISION, "computes in bfloat16", (_also(ALONE, *_computing("bfloat16")),)),
    Run(
        "bfloat16-fsdp",
        PRECISION,
        "computes in bfloat16, FSDP 2",
        (_also(FSDP, *_computing("bfloat16")),),
    ),
    Run(
        "bfloat16-weights",
        PRECISION,
        "weights in bfloat16, too",
        (_also(ALONE, *_computing("bfloat16", "--training.dtype=bfloat16")),),
    ),
    Run("killed", CHECKPOINT, "killed three times", _killed([ALONE] * 4, _MODES[0])),
    Run("async", CHECKPOINT, "saves beside training, killed once", _killed([ALONE] * 2, *_MODES)),
    Run(
        "pinned",
        CHECKPOINT,
        "the same, pinned memory",
        _killed([ALONE] * 2, _MODES[0], f"{_MODES[1]}_with_pinned_mem"),
    ),
    Run(
        "moved",
        CHECKPOINT,
        "killed three times, each time onto another mesh",
        _killed([ALONE, FSDP, TENSOR, PIPELINE], _MODES[0]),
    ),
)
REFERENCE = RUNS[0]

# --- running --------------------------------------------------------------------------------------


class Failure(Exception):
    """A run that did not do what it is for."""


def command_line(leg: Leg) -> list[str]:
    """The arguments of `torchtitan.train`, but for the folder."""
    # Of a key that is given twice, the later one counts.
    chosen = {text.partition("=")[0]: text for text in (*COMMON, *leg.arguments)}
    return [f"--job.config_file={CONFIG}", *chosen.values()]


class Runner:
    """Runs in folders of `folder`, one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder

    def curve(self, run: Run) -> list[float] | None:
        """The losses of a finished run."""
        if not self._is_finished(run):
            return None
        lines = (self.folder / run.name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            raise Failure(f"{run.name}: metrics.jsonl does not have each step once")
        return [math.nan if row["loss"] is None else row["loss"] for row in rows]

    def seconds(self) -> float:
        """How long all finished runs took."""
        return sum(self._record(run).get("seconds", 0.0) for run in RUNS)

    def train(self, run: Run, number: int) -> None:
        """Train a run from its start; does nothing when it is finished."""
        if self._is_finished(run):
            print(f"[{number}/{len(RUNS)}] {run.name}: finished before", flush=True)
            return
        shutil.rmtree(self.folder / run.name, ignore_errors=True)
        self._file(run, "json").unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with self._file(run, "log").open("w") as log:
            for leg in run.legs:
                self._train_leg(run, leg, log, f"[{number}/{len(RUNS)}] {run.name}")
        record = {**self._asked(run), "seconds": time.monotonic() - started}
        self._file(run, "json").write_text(json.dumps(record))

    def _train_leg(self, run: Run, leg: Leg, log: Any, title: str) -> None:
        processes = self._start(run, leg, log)
        told = time.monotonic()
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(0.05)
                step = self._logged_steps(run)
                if leg.killed_after is not None and step >= leg.killed_after:
                    print(f"{title}: killed after step {step}", flush=True)
                    return
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    print(f"{title}: step {step} of {STEPS}", flush=True)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(process.returncode for process in processes):
            raise Failure(f"{run.name} failed; see {self._file(run, 'log')}")
        if leg.killed_after is not None:
            raise Failure(f"{run.name} was over before it could be killed")
        print(f"{title}: step {self._logged_steps(run)} of {STEPS}, finished", flush=True)

    def _start(self, run: Run, leg: Leg, log: Any) -> list[subprocess.Popen[bytes]]:
        """Without torchrun, whose processes would outlive it for a while when it is killed."""
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        # One thread each: then sums are the same however many cores there are.
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        common |= {"WORLD_SIZE": leg.processes, "LOCAL_WORLD_SIZE": leg.processes}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        folder = f"--job.dump_folder={self.folder / run.name}"
        started = []
        for rank in range(leg.processes):
            place = {**common, "RANK": rank, "LOCAL_RANK": rank}
            launcher = {name: str(value) for name, value in place.items()}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torchtitan.train", *command_line(leg), folder],
                    env={**os.environ, "PYTHONPATH": path, **launcher},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return started

    def _logged_steps(self, run: Run) -> int:
        metrics = self.folder / run.name / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def _is_finished(self, run: Run) -> bool:
        return self._record(run).get("legs") == self._asked(run)["legs"]

    def _record(self, run: Run) -> dict[str, Any]:
        file = self._file(run, "json")
        return json.loads(file.read_text()) if file.exists() else {}

    def _asked(self, run: Run) -> dict[str, Any]:
        """What was run, as JSON gives it back."""
        legs = [{**asdict(leg), "arguments": command_line(leg)} for leg in run.legs]
        return {"legs": legs}

    def _file(self, run: Run, suffix: str) -> Path:
        return self.folder / f"{run.name}.{suffix}"


# --- the page -------------------------------------------------------------------------------------

Curves = dict[str, list[float]]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of the last `SMOOTHED` losses, at each step; of fewer at the start."""
    windows = [losses[max(0, n + 1 - SMOOTHED) : n + 1] for n in range(len(losses))]
    return [math.fsum(window) / len(window) for window in windows]


def differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, reference, strict=True)]


def row(run: Run, curves: Curves) -> str:
    """A run's line of the table."""
    cells = [run.group, run.label, ", ".join(str(leg.processes) for leg in run.legs)]
    losses, reference = curves.get(run.name), curves.get(REFERENCE.name)
    if losses is None or reference is None:
        return f"| {' | '.join([*cells, *['not run'] * 5])} |"
    found = differences(losses, reference)
    numbers = [max(found[:10]), max(found[:100]), max(found)]
    end, expected = smoothed(losses)[-1], smoothed(reference)[-1]
    cells += [f"{value:.1e}" if value else "0" for value in numbers]
    cells += [f"{end:.4f}", f"{end - expected:+.1e}" if end != expected else "0"]
    return f"| {' | '.join(cells)} |"


def table(curves: Curves) -> str:
    titles = ["", "run", "processes", "first 10 steps", "first 100", f"all {STEPS}"]
    titles += ["loss at the end", "difference"]
    rule = "|---|---|---:|---:|---:|---:|---:|---:|"
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(row(run, curves) for run in RUNS)])


def write_page(curves: Curves, seconds: float) -> None:
    """Replace what stands between the marks."""
    import torch

    date = datetime.datetime.now(tz=datetime.timezone.utc).date()
    missing = [run.name for run in RUNS if run.name not in curves]
    made = (
        f"Made on {date} with torchtitan {__version__}, PyTorch {torch.__version__} and Python"
        f" {platform.python_version()}, on {os.cpu_count()} CPU cores ({platform.machine()}), in"
        f" {seconds / 60:.0f} minutes."
    )
    parts = [BEGIN, made]
    if missing:
        parts.append(f"**Not complete: {', '.join(missing)} are still to be run.**")
    if PICTURE.exists():
        image = PICTURE.relative_to(PAGE.parent).as_posix()
        parts.append(f"![Losses of all runs, and their differences to the first]({image})")
    parts += [table(curves), END]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")
    print(f"wrote {PAGE}")


def draw(curves: Curves) -> None:
    """A column for each group: the losses, and below them their differences to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = (MESH, PRECISION, CHECKPOINT)
    figure, axes = pyplot.subplots(2, len(groups), figsize=(15, 8), sharex=True, sharey="row")
    reference = curves[REFERENCE.name]
    steps = range(1, STEPS + 1)
    for group, above, below in zip(groups, *axes):
        above.plot(steps, smoothed(reference), color="black", linewidth=2, label=REFERENCE.label)
        for number, run in enumerate(r for r in RUNS if r.group == group and r.name in curves):
            if run is REFERENCE:
                continue
            losses, color = curves[run.name], f"C{number}"
            above.plot(steps, smoothed(losses), color=color, linewidth=1, label=run.label)
            found = smoothed(differences(losses, reference))
            # Nothing is drawn where there is no difference.
            seen = [value if value > 0 else math.nan for value in found]
            label = run.label if max(found) > 0 else f"{run.label}: no difference"
            below.plot(steps, seen, color=color, linewidth=1, label=label)
        above.set_title(group)
        below.set_yscale("log")
        below.set_xlabel("step")
        above.legend(fontsize="small")
        below.legend(fontsize="small")
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"loss, mean of {SMOOTHED} steps")
    axes[1][0].set_ylabel(f"difference to one process, mean of {SMOOTHED} steps")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=80)
    print(f"wrote {PICTURE}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "converging")
    parser.add_argument("--again", choices=[run.name for run in RUNS], action="append", default=[])
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    if find_spec("matplotlib") is None:
        print("The picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    # So that a run does not go on when its script is asked to end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    runner = Runner(options.folder.resolve())
    for name in options.again:
        (runner.folder / f"{name}.json").unlink(missing_ok=True)
    try:
        for number, run in enumerate(RUNS if not options.page_only else (), start=1):
            runner.train(run, number)
        curves = {run.name: runner.curve(run) for run in RUNS}
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    finished = {name: losses for name, losses in curves.items() if losses is not None}
    if REFERENCE.name in finished and len(finished) > 1:
        draw(finished)
    write_page(finished, runner.seconds())
    return 0


_Raw = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
