"""Pipeline schedules: what torch's schedules require, schedules from a file, and an order of
forwards for evaluation. No torch.

A schedule from a file has a line for each rank along the pipeline, with cells such as `0F2` (stage
0, forward of microbatch 2), `0B2` (its backward) or, with the backward split in two, `0I2` (for the
inputs) and `0W2` (for the weights). `(0F3;1B1)OVERLAP_F_B` is a pair, and an empty cell is idle.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchtitan.config.errors import ConfigError, ConfigIssue

CSV_KEY = "parallelism.pipeline_parallel_schedule_csv"

_ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


@dataclass(frozen=True)
class ScheduleKind:
    """The requirements of one of torch's schedules."""

    stages_per_rank: int | None = None
    """The exact number; None: two or more."""
    is_v: bool = False
    """The first rank holds the last stage, too."""
    splits_backward: bool = False
    """Gradients of weights are computed later than those of inputs."""
    goes_in_rounds: bool = False
    """Microbatches go in rounds of equal size; their number is that of microbatches per pipeline
    rank, rounded down."""


SCHEDULES = {
    "GPipe": ScheduleKind(stages_per_rank=1),
    "1F1B": ScheduleKind(stages_per_rank=1),
    "Interleaved1F1B": ScheduleKind(goes_in_rounds=True),
    "LoopedBFS": ScheduleKind(),
    "InterleavedZeroBubble": ScheduleKind(splits_backward=True, goes_in_rounds=True),
    "ZBVZeroBubble": ScheduleKind(stages_per_rank=2, is_v=True, splits_backward=True),
    "DualPipeV": ScheduleKind(stages_per_rank=2, is_v=True, splits_backward=True),
}


class Action(NamedTuple):
    """Work on one microbatch in one stage: F, B (whole backward), I or W (its two halves)."""

    stage: int
    kind: str
    microbatch: int


@dataclass(frozen=True)
class FileSchedule:
    """What the library needs to know of a schedule from a file."""

    stage_to_rank: tuple[int, ...]
    """The rank along the pipeline of each stage."""
    splits_backward: bool


def read_schedule(path: str, degree: int, num_microbatches: int) -> FileSchedule:
    """Read the schedule at `path` for `degree` ranks.

    Raises `ConfigError` if it cannot be read or would not train every microbatch once. Deadlocks
    are left to `torch_compat.require_runnable_schedule`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        fix = "write the path of a schedule, or leave it empty to use a named one"
        problem = ConfigIssue(CSV_KEY, f"cannot be read: {reason}", fix, path, missing_asset=True)
        raise ConfigError(problem) from None
    try:
        lines = csv.reader(text.splitlines())
        ranks = [_parse_line(index, cells) for index, cells in enumerate(lines)]
        if len(ranks) != degree:
            raise ValueError(
                f"has {len(ranks)} lines for parallelism.pipeline_parallel_degree = {degree}"
            )
        stage_to_rank = _holders(ranks)
        _check_complete(ranks, len(stage_to_rank), num_microbatches)
    except ValueError as error:
        raise ConfigError(ConfigIssue(CSV_KEY, str(error), "mend the file", path)) from None
    splits = any(action.kind == "W" for rank in ranks for group in rank for action in group)
    return FileSchedule(stage_to_rank, splits)


def _parse_line(rank: int, cells: list[str]) -> list[tuple[Action, ...]]:
    """Return a rank's actions in order, pairs together."""
    groups = []
    for place, cell in enumerate(cells, start=1):
        if not cell.strip():
            continue
        pair = _PAIR.fullmatch(cell.strip())
        matches = [_ACTION.fullmatch(part.strip()) for part in (pair.groups() if pair else [cell])]
        actions = [Action(int(m[1]), m[2], int(m[3])) for m in matches if m]
        if len(actions) < len(matches):
            raise ValueError(
                f"line {rank + 1}, cell {place} is {cell.strip()!r}, and not an action such as 0F2"
                " (stage, one of F, B, I, W, microbatch)"
            )
        groups.append(tuple(actions))
    return groups


def _holders(ranks: Sequence[Sequence[tuple[Action, ...]]]) -> tuple[int, ...]:
    holder: dict[int, int] = {}
    for rank, groups in enumerate(ranks):
        if not groups:
            raise ValueError(f"line {rank + 1} has no action")
        for action in (action for group in groups for action in group):
            if holder.setdefault(action.stage, rank) != rank:
                first = holder[action.stage] + 1
                raise ValueError(f"stage {action.stage} is on line {first} and on line {rank + 1}")
    missing = set(range(max(holder))) - holder.keys()
    if missing:
        raise ValueError(f"stage {min(missing)} is missing, and stage {max(holder)} is there")
    return tuple(holder[stage] for stage in range(len(holder)))


def _check_complete(
    ranks: Sequence[Sequence[tuple[Action, ...]]], num_stages: int, num_microbatches: int
) -> None:
    """Require one forward and one backward, whole or in halves, per stage and microbatch."""
    actions = [action for groups in ranks for group in groups for action in group]
    counts = Counter(actions)
    for action, count in counts.items():
        if count > 1:
            raise ValueError(f"{_name(action)} is there {count} times")
        if action.microbatch >= num_microbatches:
            raise ValueError(
                f"{_name(action)}: a step of this config has {num_microbatches} microbatches"
                " (sequences of a rank and step / parallelism.pipeline_parallel_microbatch_size)"
            )
    found = 1 + max(action.microbatch for action in actions)
    if found < num_microbatches:
        raise ValueError(
            f"has {found} microbatches, and a step of this config has {num_microbatches} (sequences"
            " of a rank and step / parallelism.pipeline_parallel_microbatch_size)"
        )
    for stage in range(num_stages):
        for microbatch in range(num_microbatches):
            kinds = "".join(k for k in "FBIW" if Action(stage, k, microbatch) in counts)
            if kinds not in ("FB", "FIW"):
                name = f"stage {stage}, microbatch {microbatch}"
                raise ValueError(f"{name} has {kinds or 'nothing'}, and needs F and B, or F, I, W")
    last = [a.microbatch for a in actions if (a.stage, a.kind) == (num_stages - 1, "F")]
    if last != sorted(last):  # torch finds a microbatch's loss by its place
        raise ValueError("the last stage's forwards are not in the order of the microbatches")


def _name(action: Action) -> str:
    return f"{action.stage}{action.kind}{action.microbatch}"


def forward_ticks(stage_to_rank: Sequence[int], num_microbatches: int) -> list[dict[int, Action]]:
    """Return an order of forwards: for each tick, the work of each rank that is not idle.

    Results are passed on at the end of a tick. A rank prefers its latest stage, so that few
    microbatches are in flight.
    """
    next_microbatch = [0] * len(stage_to_rank)  # of each stage
    ticks = []
    while next_microbatch[-1] < num_microbatches:
        tick: dict[int, Action] = {}
        for stage in reversed(range(len(stage_to_rank))):
            microbatch = next_microbatch[stage]
            arrived = num_microbatches if stage == 0 else next_microbatch[stage - 1]
            if microbatch < arrived and stage_to_rank[stage] not in tick:
                tick[stage_to_rank[stage]] = Action(stage, "F", microbatch)
        for action in tick.values():
            next_microbatch[action.stage] += 1
        ticks.append(tick)
    return ticks
