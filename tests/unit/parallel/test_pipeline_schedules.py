"""Schedules from a file, and the order of forwards alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from torchtitan.config import ConfigError
from torchtitan.parallel.pipeline.schedules import (
    SCHEDULES,
    forward_ticks,
    read_schedule,
)
from torchtitan.utils.torch_compat import require_runnable_schedule

MULTI = [name for name, kind in SCHEDULES.items() if kind.stages_per_rank != 1]


def written(folder: Path, *lines: str) -> str:
    path = folder / "schedule.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", MULTI)
def test_torchs_schedules_are_read(name: str, degree: int, tmp_path: Path) -> None:
    kind = SCHEDULES[name]
    held = [0, 2 * degree - 1] if kind.is_v else [0, degree]
    stages = [
        SimpleNamespace(
            stage_index=stage, num_stages=2 * degree, group_size=degree, group_rank=0, submod=None
        )
        for stage in held
    ]
    made = schedules.get_schedule_class(name)(stages, 2 * degree, loss_fn=lambda *_: None)
    path = tmp_path / "schedule.csv"
    made._dump_csv(str(path), format="compute_only")
    stage_to_rank = tuple(made.stage_index_to_group_rank[stage] for stage in range(2 * degree))
    assert read_schedule(str(path), degree) == (stage_to_rank, kind.splits_backward)


GOOD = ["0F0,0F1,,0B0,0B1", "1F0,1B0, 1F1 ,1I1,1W1"]


def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    assert read_schedule(written(tmp_path, *GOOD), 2) == ((0, 1), True)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (GOOD[:1], "has 1 lines for parallelism.pipeline_parallel_degree = 2"),
        ([GOOD[0], ""], "line 2 has no action"),
        ([GOOD[0], GOOD[1] + ",1X0"], "line 2, cell 6 is '1X0', and not an action such as 0F2"),
        ([GOOD[0], GOOD[1] + ",1SEND_F0"], "'1SEND_F0', and not an action"),
        ([GOOD[0], GOOD[1] + ",(1F0;1B0)OVERLAP"], "and not an action"),
        ([GOOD[0], "3F0"], "stage 1 is missing, and stage 3 is there"),
    ],
)
def test_a_bad_schedule(lines: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_schedule(written(tmp_path, *lines), 2)
    assert expected in str(caught.value)
    assert "schedule.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD[0], GOOD[1] + ",1F0"], "stage 1 has two forwards of microbatch 0"),
        ([GOOD[0], "1F0,1B0,1F1,1B1,1I1,1W1"], "stage 1 has two backwards of microbatch 1"),
        ([GOOD[0], "1F0,1B0,1F1,1B0"], "stage 1 has two backwards of microbatch 0"),
        (["0F0,0F1,0B1", GOOD[1] + ",0B0"], "Stage 0 is assigned to both rank 1 and rank 0"),
        ([GOOD[0], GOOD[1] + ",1F2"], "microbatch 2 is more than 1, the last"),
        (["0F0,0F2,0B0,0B2", "1F0,1F2,1B0,1B2"], "microbatch 2 is more than 1, the last"),
        ([GOOD[0], "1F0,1B0,1F1"], "expected 2 total backwards"),
        ([GOOD[0], "1F0,1B0,1F1,1I1"], "I and W must have equal counts"),
        (["0F0,0B0", "1F0,1B0"], r"Got 1 \S+ microbatches for stage 0, expected 2"),
        (["0F0,0F1,0B0", GOOD[1]], "expected 2 total backwards"),
        ([GOOD[0], "1F1,1B1,1F0,1B0"], "not in the order of the microbatches"),
        (["0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"], "Malformed"),  # ranks wait for each other
        ([GOOD[0], "1F0,1B0,1F1,1W1,1I1"], "without first"),
        ([GOOD[0], "1B0,1F0,1F1,1B1"], "without first"),
        (["0F0,(0F1;0B0)OVERLAP_F_B,0B1", "1F0,1F1,1B0,1B1"], "Malformed"),
    ],
)
def test_a_schedule_that_cannot_train(lines: list[str], expected: str, tmp_path: Path) -> None:
    require_runnable_schedule(written(tmp_path, *GOOD), 2)
    path = written(tmp_path, *lines)
    read_schedule(path, 2)
    with pytest.raises(ValueError, match=expected):
        require_runnable_schedule(path, 2)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        read_schedule(str(tmp_path / "none.csv"), 2)
    assert caught.value.problems[0].missing_asset
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_schedule(str(tmp_path / "binary"), 2)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    "stage_to_rank",
    [(0, 1, 2), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 2, 1, 0), (0, 0, 1), (1, 0, 0, 1)],
)
def test_forward_ticks(stage_to_rank: tuple[int, ...], count: int) -> None:
    ticks = forward_ticks(stage_to_rank, count)
    when = {}
    for time, tick in enumerate(ticks):
        for rank, (stage, kind, microbatch) in tick.items():
            assert (rank, kind) == (stage_to_rank[stage], "F")
            assert (stage, microbatch) not in when
            when[stage, microbatch] = time
    assert len(when) == len(stage_to_rank) * count
    for (stage, microbatch), time in when.items():
        assert stage == 0 or when[stage - 1, microbatch] < time
    per_rank = max(map(stage_to_rank.count, stage_to_rank))
    assert len(ticks) <= per_rank * count + len(stage_to_rank) - 1, "ranks are idle without need"
    last = len(stage_to_rank) - 1
    under_way = [
        sum(when[0, n] <= time <= when[last, n] for n in range(count)) for time in range(len(ticks))
    ]
    assert max(under_way) <= len(stage_to_rank)
