"""Every TOML of train_configs/ runs a step at its own scale, on fake tensors, by the command line.

Each pull request sees few blocks of each model, and of configs that differ in sizes only one; all
of them run nightly, on more ranks.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import runs
from tests.forked import execute
from tests.meta.test_train_configs import CONFIGS, ROOT, first_comment, stated
from torchtitan.config.load import load_toml

MOST_SECONDS = 60
"""Of a processor: that others are at work on this machine does not count."""
MOST_GIB = 4


class Place(NamedTuple):
    """A rank of a run that is not there."""

    config: str
    world_size: int
    rank: int

    def __str__(self) -> str:
        return f"{self.config}-{self.rank}-of-{self.world_size}"


class Outcome(NamedTuple):
    status: int
    seconds: float
    peak_gib: float
    output: str


def places(config: str, *shares: float, world_size: int | None = None) -> list[Place]:
    """The last rank of each share of the processes, which the TOML's first comment states."""
    sizes = stated(ROOT / f"train_configs/{config}.toml") if world_size is None else [world_size]
    return [Place(config, n, max(0, int(n * share) - 1)) for n in sizes for share in shares]


NAMES = [path.stem for path in CONFIGS]
ONLY_SIZES_DIFFER = {"llama3_2_1b", "llama3_2_3b", "finetune_llama3_2_1b", "finetune_llama3_2_3b"}
"""From `llama3_8b` and `finetune_llama3_8b_1gpu`."""
OFTEN = [
    *(places(name, 0)[-1] for name in NAMES if name not in ONLY_SIZES_DIFFER),
    *places("llama3_405b", 1, world_size=4096),
]
RARELY = [
    *sorted({*OFTEN, *(place for name in NAMES for place in places(name, 0, 0.4, 0.5, 1))}),
    *places("llama3_405b", 0.4, world_size=4096),
]
FEWEST_LAYERS = 2
"""Layers traced on a pipeline rank: one for each stage that an interleaved schedule gives it."""


_MEASURED = """
import resource, sys
from torchtitan.cli import main

status = main(["train", *sys.argv[1:]])
usage = resource.getrusage(resource.RUSAGE_SELF)
print("\\nMEASURED", usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)
sys.exit(status)
"""


def layers_to_trace(config: str) -> list[str]:
    """Return the arguments that shorten a model of equal blocks."""
    settings = load_toml(ROOT / f"train_configs/{config}.toml")
    layers = FEWEST_LAYERS * settings.parallelism.pipeline_parallel_degree
    return [f"--model.args.n_layers={layers}"]


def dry_run(place: Place, folder: Path, *arguments: str) -> Outcome:
    """Run the program in `folder`."""
    config = ROOT / f"train_configs/{place.config}.toml"
    place_in_world = {"WORLD_SIZE": str(place.world_size), "RANK": str(place.rank)}
    done = execute(
        [
            sys.executable,
            "-c",
            _MEASURED,
            "--comm.mode=fake_backend",
            f"--job.config_file={config}",
            *arguments,
        ],
        env=runs.environment() | place_in_world,
        cwd=folder,
        timeout=500,
    )
    output, _, measured = done.stdout.partition("MEASURED ")
    seconds, peak_gib = map(float, measured.split())
    return Outcome(done.returncode, seconds, peak_gib, output + done.stderr)


def check(place: Place, folder: Path, *arguments: str) -> Outcome:
    outcome = dry_run(place, folder, *arguments)
    assert outcome.status == 0, outcome.output
    assert f"runs on rank {place.rank}" in outcome.output
    assert not list(folder.iterdir()), "a dry run leaves nothing behind"
    return outcome


@pytest.mark.parametrize("place", OFTEN, ids=str)
def test_dry_run(place: Place, tmp_path: Path):
    check(place, tmp_path, *layers_to_trace(place.config))


@pytest.mark.nightly
@pytest.mark.parametrize("place", RARELY, ids=str)
@pytest.mark.timeout(600)
def test_dry_run_of_all_layers(place: Place, tmp_path: Path):
    outcome = check(place, tmp_path)
    assert outcome.seconds < MOST_SECONDS
    assert outcome.peak_gib < MOST_GIB
    said = stated(ROOT / f"train_configs/{place.config}.toml").get(place.world_size, "")
    for amount in re.findall(r"[\d.]+ [GM]iB", said):
        assert amount in outcome.output


def test_the_largest_are_among_them():
    assert {("llama3_405b", 512), ("llama3_405b", 4096)} <= {place[:2] for place in OFTEN}
    assert {place.config for place in RARELY} == {path.stem for path in CONFIGS}


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_four_dimensions_show_the_losses_of_one_process(tmp_path: Path):
    """As the first comment of debug_4d.toml promises."""
    config = ROOT / "train_configs/debug_4d.toml"
    curves = []
    for processes in (8, 1):
        folder = tmp_path / str(processes)
        command = runs.command(folder, processes=processes)
        command[command.index("torchtitan.train") + 1] = f"--job.config_file={config}"
        if processes == 1:
            comment = first_comment(config)
            command += re.findall(r"--parallelism\S+|(?<=_degree )1", comment)
        done = execute(command, env=runs.environment(), timeout=500)
        assert done.returncode == 0, done.stderr
        curves.append(runs.curve(folder))
    assert len(curves[0]) == 10
    for several, one in zip(*curves, strict=True):
        assert several == pytest.approx(one, rel=1e-9)
