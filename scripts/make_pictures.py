"""Draw the pictures of the docs from the code, each for light and for dark pages, as SVG:

    python scripts/make_pictures.py [FOLDER]        default: docs/images

mesh: the ranks of a 4D run, as ParallelDims lays them out. pipeline: schedules as torch runs them.
rooms: the packages, by the layers that import-linter checks. batch: from text to the loss.
"""

import re
import sys
from html import escape
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.config.schema import Parallelism
from torchtitan.config.toml_file import tomllib
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.parallel.pipeline.stages import plan_pipeline
from torchtitan.utils.torch_compat import build_pipeline_schedule

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "images"
COLOURS = {
    "light": {
        "ink": "#1f2328",
        "dim": "#59636e",
        "line": "#8c959f",
        "panel": "#f3f4f6",
        "blue": "#b6d7ff",
        "orange": "#ffd3a8",
        "green": "#b4e3bd",
        "purple": "#ddc8ff",
        "strong blue": "#7fb4f5",
        "strong orange": "#f5ad66",
        "strong green": "#7cc98a",
    },
    "dark": {
        "ink": "#e6edf3",
        "dim": "#a4acb5",
        "line": "#6e7681",
        "panel": "#2b313b",
        "blue": "#1f4b80",
        "orange": "#80501a",
        "green": "#24602f",
        "purple": "#533b8c",
        "strong blue": "#2f6fbd",
        "strong orange": "#b3701f",
        "strong green": "#36904a",
    },
}


class Picture:
    """Shapes with names of colours, written as SVG for one kind of page."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self._shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str = ""):
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"'
            f' fill="{{{fill}}}"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, anchor="middle")

    def text(
        self, x: float, y: float, text: str, anchor="start", size=14, colour="ink", bold=False
    ):
        style = ' font-weight="600"' if bold else ""
        style += f' font-size="{size}"' if size != 14 else ""
        style += f' fill="{{{colour}}}"' if colour != "ink" else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float):
        self._shapes.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{{line}}" stroke-width="1.5"'
            ' marker-end="url(#tip)"/>'
        )

    def svg(self, page: str) -> str:
        """The picture for "light" or "dark" pages."""
        shapes = re.sub(r"\{([a-z ]+)\}", lambda m: COLOURS[page][m[1]], "\n".join(self._shapes))
        ink, line = COLOURS[page]["ink"], COLOURS[page]["line"]
        return f"""<svg xmlns="http://www.w3.org/2000/svg"
 width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"
 font-family="system-ui, Helvetica, Arial, sans-serif" font-size="14" fill="{ink}">
<style>rect {{ stroke: {line}; stroke-width: 0.7 }}</style>
<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6"
 orient="auto"><path d="M0 0L6 3L0 6z" fill="{line}"/></marker></defs>
{shapes}
</svg>
"""


def mesh() -> Picture:
    """16 ranks: two stages, two shards of the data, two parts of the sequence, of each matrix."""
    dims = ParallelDims(pp=2, dp_shard=2, cp=2, tp=2)
    _join(dims.world_size)
    built = dims.build_mesh("cpu")
    ranks = built.mesh  # [pp, dp_replicate, dp_shard, cp, tp]
    picture = Picture(620, 520)
    for stage in range(dims.pp):
        top = 10 + 195 * stage
        picture.box(5, top, 610, 180, "panel")
        half = "the first half of the layers" if stage == 0 else "the second half of the layers"
        picture.text(15, top + 20, f"pp {stage}: {half}", bold=True)
        for shard in range(dims.dp_shard):
            left = 85 + 270 * shard
            colour = "orange" if shard else "blue"
            picture.text(left, top + 44, f"dp_shard {shard}: its own sequences")
            for part in range(dims.cp):
                for slice_ in range(dims.tp):
                    rank = int(ranks[stage, 0, shard, part, slice_])
                    assert dims.dp_rank(rank) == shard
                    x, y = left + 125 * slice_, top + 70 + 52 * part
                    picture.box(x, y, 118, 45, colour, f"rank {rank}")
            for slice_ in range(dims.tp):
                middle = left + 125 * slice_ + 59
                picture.text(middle, top + 63, f"tp {slice_}", "middle", 12, "dim")
        for part in range(dims.cp):
            picture.text(75, top + 96 + 52 * part, f"cp {part}", "end", 12, "dim")
    groups = {
        "tp": (built["tp"], "halves of each matrix; talk in every layer"),
        "cp": (built["cp"], "halves of each sequence; pass keys and values"),
        "FSDP": (dims.shard_mesh(built), "shards of the parameters: dp_shard and cp together"),
        "pp": (built["pp"], "halves of the model; pass hidden states on"),
    }
    picture.text(5, 418, "Rank 0 talks with", bold=True)
    for row, (name, (group, text)) in enumerate(groups.items()):
        numbers = ", ".join(str(rank) for rank in group.mesh.flatten().tolist() if rank)
        y = 442 + 22 * row
        picture.text(5, y, name)
        picture.text(60, y, f"rank {numbers}" if "," not in numbers else f"ranks {numbers}")
        picture.text(180, y, text, colour="dim")
    return picture


def _join(world_size: int) -> None:
    """Be rank 0 of processes that do not exist."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")
RANKS, MICROBATCHES = 4, 8
Work = tuple[int, str, int]
"""Stage, kind (F, B, I or W) and microbatch."""


def pipeline() -> Picture:
    """Some schedules over time, if all ranks together compute as much in each."""
    unit, left = 9.8, 52
    picture = Picture(720, 448)
    for row, name in enumerate(SCHEDULES):
        top = 18 + 125 * row
        per_rank, order = _order(name)
        ends, starts = _times(order, per_rank)
        total = max(ends.values())
        busy = sum(ends[work] - starts[work] for work in ends)
        text = f"{1 - busy / total / RANKS:.0%} idle"
        picture.text(4, top, name, bold=True)
        picture.text(150, top, text)
        for rank, actions in order.items():
            y = top + 10 + 23 * rank
            picture.text(left - 6, y + 14, f"rank {rank}", "end", 11, "dim")
            for work in actions:
                stage, kind, microbatch = work
                colour = {"F": "blue", "W": "green"}.get(kind, "orange")
                colour = f"strong {colour}" if stage >= RANKS else colour
                x, width = left + unit * starts[work], unit * (ends[work] - starts[work])
                picture.box(x, y, width, 20, colour)
                picture.text(x + width / 2, y + 14, str(microbatch), "middle", 9)
    y = 404
    legend = {
        "blue": "forward of a microbatch",
        "orange": "backward (ZBV: gradients of inputs)",
        "green": "ZBV: gradients of weights",
    }
    for colour, text in legend.items():
        picture.box(52, y - 11, 14, 14, colour)
        picture.box(68, y - 11, 14, 14, f"strong {colour}")
        picture.text(90, y, text, size=12)
        y += 18
    picture.text(380, 404, "Time runs to the right; gaps are idle.", size=12, colour="dim")
    picture.text(380, 422, "The stronger colour is the rank's second stage.", size=12, colour="dim")
    return picture


def _order(name: str) -> tuple[int, dict[int, list[Work]]]:
    """The stages of a rank, and the work of each rank as torch orders it."""
    section = Parallelism(pipeline_parallel_degree=RANKS, pipeline_parallel_schedule=name)
    plan = plan_pipeline(section, {f"layers.{n}": 1 for n in range(2 * RANKS)})
    _join(RANKS)
    count, device = len(plan.stage_to_rank), torch.device("cpu")
    stages = [PipelineStage(torch.nn.Identity(), n, count, device) for n in plan.held_by(0)]
    schedule = build_pipeline_schedule(name, "", stages, MICROBATCHES, lambda out, target: out)
    order = getattr(schedule, "pipeline_order", None) or schedule._get_pipeline_order()
    found = {}
    for rank, actions in order.items():
        seen: dict[tuple[int, str], int] = {}
        found[rank] = []
        for action in actions:
            if match := re.fullmatch(r"(\d+)([FBIW])\d+", str(action)):
                stage, kind = int(match[1]), match[2]
                # Counted, as torch misnumbers the forwards of 1F1B's last rank.
                seen[stage, kind] = seen.get((stage, kind), -1) + 1
                found[rank].append((stage, kind, seen[stage, kind]))
    return len(stages), found


def _times(
    order: dict[int, list[Work]], per_rank: int
) -> tuple[dict[Work, float], dict[Work, float]]:
    """The end and the start of all work: a backward takes two forwards, each half of it one."""
    last = RANKS * per_rank - 1
    ends: dict[Work, float] = {}
    starts: dict[Work, float] = {}
    todo = {rank: list(actions) for rank, actions in order.items()}
    free = dict.fromkeys(order, 0.0)
    while any(todo.values()):
        done = len(ends)
        for rank, actions in todo.items():
            while actions:
                stage, kind, microbatch = work = actions[0]
                back = "B" if (stage, "B", microbatch) in order[rank] else "I"
                needs = {
                    "F": [(stage - 1, "F", microbatch)] if stage else [],
                    "W": [(stage, "I", microbatch)],
                }.get(kind, [(stage, "F", microbatch)])
                if kind in "BI" and stage < last:
                    needs = [*needs, (stage + 1, back, microbatch)]
                if any(need not in ends for need in needs):
                    break
                starts[work] = max([free[rank], *(ends[need] for need in needs)])
                free[rank] = ends[work] = starts[work] + (2 if kind == "B" else 1) * 2 / per_rank
                actions.pop(0)
        assert len(ends) > done, "the ranks wait for each other"
    return ends, starts


def rooms() -> Picture:
    """The packages, as high as they may import: each only from below."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    picture = Picture(720, 26 + 42 * len(layers) + 68)
    text = "Imports point down; the six in the middle do not import each other."
    picture.text(8, 14, text, size=12, colour="dim")
    y = 24
    for layer in layers:
        names = re.split(r" [:|] ", layer)
        together = len(names) > 2
        if together:
            picture.box(40, y - 3, 676, 110, "panel")
        for place, name in enumerate(names):
            column, row = place % 3, place // 3
            width = 220 if together else 668 / len(names)
            x, top = 44 + (column * 224 if together else place * width), y + 52 * row
            colour = "purple" if together else "blue"
            picture.box(x, top, width - 4 * (len(names) > 1), 48 if together else 36, colour)
            picture.text(x + 10, top + (19 if together else 23), name, bold=True)
            size = (
                f"{_lines(name) / 1000:.1f}k lines" if (ROOT / "torchtitan" / name).is_dir() else ""
            )
            picture.text(x + width - 14, top + (19 if together else 23), size, "end", 12, "dim")
            place = (x + 10, top + 38) if together else (x + 104, top + 23)
            picture.text(*place, PURPOSE[name], size=12)
        y += 110 if together else 42
    picture.arrow(22, 30, 22, y - 10)
    picture.height = y + 4
    return picture


def _lines(room: str) -> int:
    files = (ROOT / "torchtitan" / room).rglob("*.py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


PURPOSE = {
    "__main__": "python -m torchtitan",
    "train": "torchrun -m torchtitan.train",
    "cli": "reads a command line and runs the command",
    "commands": "what each command does; dry runs",
    "api": "train, load and generate from Python",
    "preflight": "every check of a run before it starts",
    "training": "the builder, the loop, the end of a run",
    "evaluation": "the tasks of lm-eval on any mesh",
    "generation": "KV cache and sampling",
    "handlers": "changes to a model: LoRA, float8",
    "data": "from files to batches",
    "checkpoint": "saves, resumes, first weights",
    "optim": "optimizers and schedules",
    "loss": "cross entropy, DPO, distillation",
    "metrics": "records and where they go",
    "weights": "formats of Hugging Face, Meta and GGUF; the hub",
    "parallel": "FSDP, tensor, context, pipeline; recomputation, compile",
    "distributed": "processes and meshes",
    "models": "the decoder and its families",
    "config": "sections, loading, errors; no torch",
    "utils": "logging, devices, files",
}


def batch() -> Picture:
    """From text to the loss: 4 lanes, a global batch of 8 sequences, 2 data ranks."""
    picture = Picture(720, 560)
    colours = ("blue", "orange", "green", "purple")
    _step(picture, 20, "documents", "of data.sources, by weight")
    for place in range(8):
        picture.box(190 + 64 * place, 6, 40 + 4 * (place * 5 % 4), 24, colours[place % 4])
    _step(picture, 80, "tokens", "of the tokenizer")
    for place in range(8):
        count = 4 + place * 5 % 4
        for token in range(count):
            picture.box(190 + 64 * place + 7 * token, 68, 5, 20, colours[place % 4])
    _step(picture, 150, "lanes", "data.lanes: order and")
    picture.text(4, 184, "packing, without a mesh", size=12, colour="dim")
    for lane, lengths in enumerate(_LANES):
        y = 126 + 26 * lane
        picture.text(186, y + 14, f"{lane}", "end", 12, "dim")
        x = 192.0
        for place, length in enumerate(lengths):
            picture.box(x, y, length, 20, colours[(place + lane) % 4])
            x += length
        for end in (252, 504):
            picture.box(190 + end, y - 2, 3, 24, "ink")
    picture.text(190, 250, "one sequence of training.seq_len", size=12, colour="dim")
    picture.text(446, 250, "the next one of the same step", size=12, colour="dim")
    _step(picture, 292, "data ranks", "an equal part of the lanes")
    for rank in range(2):
        x = 190 + 262 * rank
        picture.box(x, 272, 240, 34, "panel", f"dp {rank}: lanes {2 * rank} and {2 * rank + 1}")
        picture.arrow(x + 120, 256, x + 120, 270)
        picture.arrow(x + 60, 308, x + 60, 324)
        picture.arrow(x + 180, 308, x + 180, 324)
        for micro in range(2):
            picture.box(x + 122 * micro, 328, 118, 40, "blue", f"microbatch {micro}")
            picture.arrow(x + 60 + 122 * micro, 370, x + 60 + 122 * micro, 388)
            picture.box(x + 122 * micro, 392, 118, 40, "orange", "loss sum")
            picture.arrow(x + 60 + 122 * micro, 434, x + 60 + 122 * micro, 452)
    _step(picture, 346, "microbatches", "training.local_batch_size")
    _step(picture, 410, "loss", "a sum over the targets")
    _step(picture, 474, "step", "one for all ranks")
    picture.box(
        190, 456, 502, 34, "green", "sum of all losses / number of all targets, gradients alike"
    )
    picture.arrow(441, 492, 441, 512)
    _step(picture, 534, "record", "metrics.jsonl, TensorBoard")
    picture.box(
        190, 516, 502, 34, "panel", "loss, grad_norm, lr, num_targets, num_tokens_seen, ..."
    )
    return picture


_LANES = ((140, 170, 194), (90, 162, 60, 192), (230, 120, 154), (60, 130, 110, 204))
"""Lengths of documents in each lane: two sequences of 252."""


def _step(picture: Picture, y: float, name: str, text: str) -> None:
    picture.text(4, y, name, bold=True)
    picture.text(4, y + 17, text, size=12, colour="dim")


PICTURES = {"mesh": mesh, "pipeline": pipeline, "rooms": rooms, "batch": batch}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else FOLDER
    for name, draw in PICTURES.items():
        picture = draw()
        for page in COLOURS:
            path = folder / f"{name}-{page}.svg"
            path.write_text(picture.svg(page), encoding="utf-8")
            print(f"wrote {path}")
