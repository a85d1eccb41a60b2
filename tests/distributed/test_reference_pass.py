"""When the log-probabilities of a reference are computed, and that nothing is left of it."""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.chat_data import chat_config, pair_rows, write_rows
from tests.distributed import tiny
from tests.pool import GlooPool
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.loss.preference import REFERENCE
from torchtitan.loss.reference_cache import answer_keys
from torchtitan.models.batch import Batch
from torchtitan.training.reference_pass import (
    PairSet,
    cached_log_probs,
    reference_facts,
    sets_of_run,
)


class Reference:
    """Says the halves of an answer's key; ends after some batches."""

    def __init__(self, batches: int = 100) -> None:
        self.left = batches
        self.itself = self  # as modules do

    def __call__(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return [Batch({**batch, REFERENCE: answer_keys(batch) / 2}) for batch in batches]


def passes(world: DistributedContext, folder: Path) -> list[int]:
    """Builds of the reference at each start."""
    mine = Batch({name: tensor[world.rank :: 2] for name, tensor in tiny.pairs().items()})
    built: list[weakref.ref[Reference]] = []

    def sets(names: str) -> list[PairSet]:
        def batches() -> Iterator[list[Batch]]:
            yield [Batch({name: tensor[:1] for name, tensor in mine.items()})]
            yield [Batch({name: tensor[1:] for name, tensor in mine.items()})]

        return [PairSet(name, {"data": name}, batches) for name in names]

    def start(names: str, facts: str, reference: Callable[[], Reference] = Reference) -> int:
        before = len(built)

        def build() -> Reference:
            made = reference()
            built.append(weakref.ref(made))
            return made

        found = cached_log_probs(sets(names), facts, folder, build, world)
        whole = tiny.pairs()
        values = found.annotated(whole)[REFERENCE]
        assert torch.equal(values, answer_keys(whole) / 2), "those of all ranks"
        assert all(made() is None for made in built), "freed"
        return len(built) - before

    with pytest.raises(KeyboardInterrupt):
        start("a", "one", lambda: Reference(1))
    assert not folder.exists() or not list(folder.iterdir()), "nothing of half a pass"
    counts = [start("a", "one"), start("a", "one"), start("ab", "one"), start("ab", "two")]
    counts += [start("b", "one")]
    world.barrier()
    if world.is_main:
        for path in folder.iterdir():
            path.write_bytes(b"damaged")
    world.barrier()
    return [*counts, start("b", "one")]


def test_a_pass_for_each_reference_and_set(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for counts in gloo_pool.run(2, passes, tmp_path / "kept"):
        assert counts == [1, 0, 1, 1, 0, 1]
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_whatever_changes_the_values_is_a_fact() -> None:
    """A seed only where a handler may add parameters from it."""

    def facts(args: str = "of 2 layers", weights: str = "digest", **sections: Any) -> str:
        config = JobConfig.model_validate(sections)
        model: Any = SimpleNamespace(args=args)
        return repr(reference_facts(config, model, weights))

    adapted = {"model": {"handlers": ["lora"]}, "handlers": {"lora": {"rank": 4}}}
    half = {"training": {"mixed_precision_param": "bfloat16"}}
    whole = {"training": {"mixed_precision_param": "float32"}}
    stored = {"training": {"mixed_precision_param": "float32", "dtype": "bfloat16"}}
    found = [facts(**adapted), facts(**adapted, debug={"seed": 3}), facts(**stored)]
    found += [facts(**half), facts(**whole), facts(args="of 3 layers", **half)]
    found += [facts(weights="other", **half), facts(**half, model={"norm_type": "layernorm"})]
    found += [facts(**half, checkpoint={"exclude_from_loading": ["output.weight"]})]
    assert len({*found}) == len(found)
    assert facts(**half, debug={"seed": 3}) == facts(**half)


def test_whatever_changes_the_pairs_is_a_fact(tmp_path: Path) -> None:
    """Not what says how a step is made of them."""
    path = write_rows(tmp_path, pair_rows(9))
    dims: Any = SimpleNamespace(dp=1, dp_rank=int, is_data_leader=bool)
    world: Any = SimpleNamespace(rank=0)
    anything: Any = None

    def facts(key: str, value: Any) -> str:
        config = chat_config(path, format="preference")
        section, _, name = key.partition(".")
        table = getattr(config, section).model_dump() | {name: value}
        config = JobConfig.model_validate(config.model_dump() | {section: table})
        context = RunContext(config, 1, "cpu")
        (only,) = sets_of_run(context, dims, world, build_tokenizer("bytes"), anything, anything)
        return json.dumps(only.facts, sort_keys=True)

    other = write_rows(tmp_path, pair_rows(8), "other.jsonl")
    changes = [
        ("training.dataset_path", other),
        ("training.seq_len", 128),
        ("data.max_document_mib", 1.0),
        ("data.add_bos", False),
        ("data.chat_template", "mistral"),
        ("data.packing", False),
    ]
    same = [("data.epochs", 2), ("data.shuffle", False), ("debug.seed", 5), ("data.skip", ("1",))]
    before = facts("data.epochs", 1)
    assert [facts(*change) for change in same] == [before] * len(same)
    assert len({before, *(facts(*change) for change in changes)}) == 1 + len(changes)
