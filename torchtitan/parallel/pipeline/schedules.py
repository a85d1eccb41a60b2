"""Pipeline schedules: torch's, those from a file, and an order of forwards. No torch.

A schedule from a file has a line for each rank along the pipeline, with cells such as `0F2` (stage
0, forward of microbatch 2), `0B2` (its backward) or, with the backward split in two, `0I2` (for the
inputs) and `0W2` (for the weights). `(0F3;1B1)OVERLAP_F_B` is a pair, and an empty cell is idle.
"""

import csv
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


def read_schedule(path: str, degree: int) -> tuple[tuple[int, ...], bool]:
    """Read the schedule at `path` for `degree` ranks.

    Returns the rank of each stage, and True if the schedule splits the backward. Raises
    `ConfigError` if it cannot be read; `torch_compat.require_runnable_schedule` checks that it
    trains every microbatch once.
    """
    try:
        lines = csv.reader(Path(path).read_text(encoding="utf-8").splitlines())
        ranks = [_parse_line(index, cells) for index, cells in enumerate(lines)]
        if len(ranks) != degree:
            raise ValueError(
                f"has {len(ranks)} lines for parallelism.pipeline_parallel_degree = {degree}"
            )
        found = {action.stage: rank for rank, actions in enumerate(ranks) for action in actions}
        if missing := set(range(max(found))) - found.keys():
            raise ValueError(f"stage {min(missing)} is missing, and stage {max(found)} is there")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        fix = "write the path of a schedule, or leave it empty to use a named one"
        problem = ConfigIssue(CSV_KEY, f"cannot be read: {reason}", fix, path, missing_asset=True)
        raise ConfigError(problem) from None
    except ValueError as error:
        raise ConfigError(ConfigIssue(CSV_KEY, str(error), "correct the file", path)) from None
    stage_to_rank = tuple(found[stage] for stage in range(len(found)))
    return stage_to_rank, any(action.kind == "W" for actions in ranks for action in actions)


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
