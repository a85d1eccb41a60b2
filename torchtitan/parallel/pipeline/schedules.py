"""Pipeline schedules: torch's, those from a file, and an order of forwards. No torch.

A schedule from a file has a line for each rank along the pipeline, with cells such as `0F2` (stage
0, forward of microbatch 2), `0B2` (its backward) or, with the backward split in two, `0I2` (for the
inputs) and `0W2` (for the weights). `(0F3;1B1)OVERLAP_F_B` is a pair, and an empty cell is idle.
"""

import csv
import itertools
import re
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
    """The facts about a schedule from a file that the library needs."""

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
        stage_to_rank = _stage_to_rank(ranks)
        _check_complete([action for rank in ranks for action in rank], num_microbatches)
    except ValueError as error:
        raise ConfigError(ConfigIssue(CSV_KEY, str(error), "mend the file", path)) from None
    return FileSchedule(stage_to_rank, any(action.kind == "W" for rank in ranks for action in rank))


def _parse_line(rank: int, cells: list[str]) -> list[Action]:
    """Return a rank's actions in order, the members of a pair one after the other."""
    actions = []
    for place, cell in enumerate(map(str.strip, cells), start=1):
        pair = _PAIR.fullmatch(cell)
        for part in (pair.groups() if pair else [cell]) if cell else []:
            match = _ACTION.fullmatch(part.strip())
            if match is None:
                raise ValueError(
                    f"line {rank + 1}, cell {place} is {cell!r}, and not an action such as 0F2"
                    " (stage, one of F, B, I, W, microbatch)"
                )
            actions.append(Action(int(match[1]), match[2], int(match[3])))
    if not actions:
        raise ValueError(f"line {rank + 1} has no action")
    return actions


def _stage_to_rank(ranks: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        for action in actions:
            if found.setdefault(action.stage, rank) != rank:
                first = found[action.stage] + 1
                raise ValueError(f"stage {action.stage} is on line {first} and on line {rank + 1}")
    missing = set(range(max(found))) - found.keys()
    if missing:
        raise ValueError(f"stage {min(missing)} is missing, and stage {max(found)} is there")
    return tuple(found[stage] for stage in range(len(found)))


def _check_complete(actions: Sequence[Action], num_microbatches: int) -> None:
    """Require one forward and one backward, whole or in halves, per stage and microbatch."""
    kinds: dict[tuple[int, int], str] = {}
    for stage, kind, microbatch in actions:
        kinds[stage, microbatch] = "".join(sorted(kinds.get((stage, microbatch), "") + kind))
    found, last = 1 + max(action.microbatch for action in actions), max(kinds)[0]
    if found != num_microbatches:
        raise ValueError(
            f"has {found} microbatches, and a step of this config has {num_microbatches} (sequences"
            " of a rank and step / parallelism.pipeline_parallel_microbatch_size)"
        )
    for place in itertools.product(range(last + 1), range(num_microbatches)):
        if kinds.get(place) not in ("BF", "FIW"):
            name, has = "stage {}, microbatch {}".format(*place), kinds.get(place, "nothing")
            raise ValueError(f"{name} has {has}, and needs F and B, or F, I, W, once each")
    order = [action.microbatch for action in actions if action[:2] == (last, "F")]
    if order != sorted(order):  # torch finds a microbatch's loss by its place
        raise ValueError("the last stage's forwards are not in the order of the microbatches")


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
