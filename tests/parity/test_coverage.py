"""The table has a row for everything that is promised to be equal."""

from collections import Counter
from collections.abc import Collection
from itertools import combinations, product
from pathlib import Path
from typing import get_args

import pytest

from tests.distributed import tiny
from tests.parity.adapted import ADAPTED, QUANTISED, kind_of
from tests.parity.adapted import KINDS as KINDS_OF_LORA
from tests.parity.historical_bugs import BUGS
from tests.parity.table import TABLE, dims_of, kinds_of, name_of, special_of
from torchtitan.config.schema import Parallelism, PipelineSchedule
from torchtitan.models.batch import IGNORE_INDEX

DATA = ("ddp", "fsdp", "hsdp")
OTHERS = ("tp", "cp", "pp")
COMBINATIONS = {frozenset([*chosen]) for n in (1, 2, 3) for chosen in combinations(OTHERS, n)}
ALL_KINDS = {frozenset([kind]) for kind in DATA} | COMBINATIONS
ALL_KINDS |= {kinds | {kind} for kinds, kind in product(COMBINATIONS, DATA)}

KINDS = [kinds_of(case) for case in TABLE]
SPECIAL = Counter(special for case in TABLE for special in special_of(case))


def test_there_are_many_meshes_of_1_to_16_processes() -> None:
    assert len(TABLE) >= 60
    assert {1, 2, 3, 4, 6, 8, 16} == {case.world_size for case in TABLE}


def test_rows_differ() -> None:
    assert Counter(map(name_of, TABLE)).most_common(1)[0][1] == 1


def test_the_page_has_all_rows_and_mistakes() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "design" / "parity.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [(row[1], row[2]) for row in cells if len(row) == 7 and row[0].isdigit()]
    assert rows == [(dims_of(case).describe(), ", ".join(special_of(case))) for case in TABLE]
    mistakes = [row[0].partition(":")[0].replace(" ", "_") for row in cells if len(row) == 3]
    assert [name for name in mistakes if name in BUGS] == list(BUGS)


def test_every_pair_and_triple_of_parallelisms() -> None:
    hsdp_with_all = frozenset(["hsdp", *OTHERS])  # takes 32 processes
    assert ALL_KINDS - {*KINDS} == {hsdp_with_all}
    assert len({kinds for kinds in KINDS if len(kinds) == 3}) == 10


def test_two_of_everything() -> None:
    degrees = [(d.dp, d.cp, d.tp, d.pp) for d in map(dims_of, TABLE)]
    assert degrees.count((2, 2, 2, 2)) >= 2


@pytest.mark.parametrize("schedule", [*get_args(PipelineSchedule), "CSV"])
def test_every_schedule(schedule: str) -> None:
    assert SPECIAL[schedule] >= 1


def test_every_way_to_spread_a_sequence() -> None:
    methods = get_args(Parallelism.model_fields["context_parallel_method"].annotation)
    balancers = get_args(Parallelism.model_fields["context_parallel_load_balancer"].annotation)
    ways = {f"{method} {balancer}" for method, balancer in product(methods, balancers)}
    assert ways - {"ulysses headtail"} <= SPECIAL.keys()
    for method in methods:
        kinds = [k for case, k in zip(TABLE, KINDS) if any(method in s for s in special_of(case))]
        assert {"tp", "pp"} <= set().union(*kinds), method


@pytest.mark.parametrize("kind", [*DATA, *OTHERS])
def test_each_kind_meets_every_variant(kind: str) -> None:
    special = {s for case, kinds in zip(TABLE, KINDS) if kind in kinds for s in special_of(case)}
    wanted = {"tied", "packed", "accumulates 2", "checkpointing full", "checkpointing op"}
    assert wanted <= special
    assert any(words.startswith("compiled") for words in special)


def test_every_kind_of_checkpointing_and_compiler() -> None:
    assert SPECIAL["checkpointing 2"] >= 2
    assert {"compiled aot_eager", "compiled inductor"} <= SPECIAL.keys()


@pytest.mark.parametrize("where", ["parameters on the host", "activations on the host"])
def test_memory_on_the_host_with_every_parallelism(where: str) -> None:
    met = set().union(*(k for case, k in zip(TABLE, KINDS) if where in special_of(case)))
    assert met == {"fsdp", "hsdp", *OTHERS} | ({"ddp"} if where.startswith("activ") else set())
    assert SPECIAL["checkpointing memory budget"] >= 1


@pytest.mark.parametrize("what", ["z-loss", "label smoothing"])
def test_regularised_losses_with_every_parallelism(what: str) -> None:
    met = set().union(*(k for case, k in zip(TABLE, KINDS) if what in special_of(case)))
    assert met == {"fsdp", *OTHERS}


@pytest.mark.parametrize("what", ["DPO", "teacher"])
def test_frozen_models_with_every_parallelism(what: str) -> None:
    """And other variants of preference losses, and a teacher's top tokens, with some."""
    met = set().union(*(k for case, k in zip(TABLE, KINDS) if what in special_of(case)))
    assert met == {"fsdp", "hsdp", *OTHERS}
    assert {"conservative DPO", "robust DPO", "IPO", "SimPO", "teacher's top 7"} <= SPECIAL.keys()


def test_windows_with_every_parallelism() -> None:
    """Shorter and longer than a rank's share of the sequence, with documents and without."""
    windowed = [case for case in TABLE if case.window is not None]
    assert set().union(*map(kinds_of, windowed)) == {"fsdp", "hsdp", *OTHERS}
    spread = {name_of(case).split(", ")[-1] for case in windowed if case.cp > 1}
    assert {"window of 5", "window of 11"} <= spread
    assert {True, False} == {case.document_mask for case in windowed if case.cp > 1}
    special = {words for case in windowed for words in special_of(case)}
    assert {"checkpointing full", "checkpointing op", "compiled aot_eager"} <= special


def test_adapters_and_dropout_with_what_cuts_them() -> None:
    """Tensor and context ranks draw other numbers than one process."""
    for family, kinds in (("low rank", {"fsdp", *OTHERS}), ("dropping", {*DATA, "pp"})):
        met = set().union(*(k for case, k in zip(TABLE, KINDS) if case.family == family))
        assert met == kinds, family


GROUPS = {
    "LoRA": ("LoRA",),
    "DoRA": ("DoRA", "DoRA with dropout"),
    "dropout": ("LoRA with dropout", "DoRA with dropout"),
    "QLoRA": tuple(QUANTISED),
}
OPTIONS = ("checkpointing", "compiled", "accumulates", "parameters on", "activations on")


def met_by(kinds: Collection[str]) -> set[tuple[str, ...]]:
    """The parallelisms, pairs of them, options, and options with a parallelism, of adapters."""
    met: set[tuple[str, ...]] = set()
    for case in (case for case in ADAPTED if kind_of(case) in kinds):
        axes, words = sorted(kinds_of(case)), list(special_of(case))
        options = [name for name in OPTIONS if any(text.startswith(name) for text in words)]
        met |= {(axis,) for axis in axes} | {(option,) for option in options}
        met |= set(combinations(axes, 2)) | {(o, axis) for o in options for axis in axes}
    return met


@pytest.mark.parametrize("group", GROUPS)
def test_each_kind_of_adapters_with_every_parallelism_and_option(group: str) -> None:
    wanted = {(name,) for name in (*DATA, "fsdp", "hsdp", *OTHERS, *OPTIONS)}
    assert wanted <= met_by(GROUPS[group])


@pytest.mark.parametrize("kinds", [KINDS_OF_LORA, QUANTISED], ids=["lora", "qlora"])
def test_adapters_with_pairs_of_parallelisms(kinds: Collection[str]) -> None:
    assert set(combinations(sorted(["fsdp", *OTHERS]), 2)) <= met_by(kinds)


def test_options_of_adapters_with_every_parallelism() -> None:
    """DDP holds parameters on the device."""
    wanted = set(product(OPTIONS, [*DATA, "fsdp", "hsdp", *OTHERS])) - {("parameters on", "ddp")}
    assert wanted <= met_by([*KINDS_OF_LORA, *QUANTISED])


def test_ranks_have_unequal_numbers_of_targets() -> None:
    counted = tiny.sequences()["labels"] != IGNORE_INDEX
    for ranks in (2, 4, 8):
        of_data_ranks = [int(part.sum()) for part in counted.chunk(ranks)]
        assert len(set(of_data_ranks)) > ranks // 2
        along_the_sequence = [int(part.sum()) for part in counted.chunk(ranks, dim=1)]
        assert len(set(along_the_sequence)) == ranks


def test_documents_begin_anywhere() -> None:
    """Within a rank's share of the sequence and at its edge; and some go through several."""
    ids = tiny.sequences()["document_ids"]
    starts = (ids.diff(dim=1) > 0).nonzero()[:, 1] + 1
    assert {0, *range(1, 8)} == {int(start) % 8 for start in starts}
    assert int(ids[0, 0]) == int(ids[0, -1])


def test_the_vocabulary_and_the_groups_of_heads_divide_nothing() -> None:
    assert all(tiny.VOCAB_SIZE % n for n in range(2, tiny.VOCAB_SIZE))
    assert all(case.kv_heads < case.heads for case in TABLE)
