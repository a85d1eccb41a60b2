"""A handler's state is in checkpoints. The handler is the average of docs/guides/own_handler.md."""

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.distributed import runs, tiny
from tests.distributed.test_own_handler import PAGE, block
from tests.distributed.tiny import Case
from tests.faults.saving import digest, make_store
from tests.pool import GlooPool
from torchtitan.checkpoint.dcp_io import SafeReader
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import RunState, read_manifest
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.handlers.registry import HANDLERS
from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.training import builder, model_builder

SOURCE = block("python", PAGE.partition("## State that it keeps")[2])
STEPS = 2


def register(change: str = "") -> None:
    """The page's handler, with lines of a test at the end of its class."""
    module = ModuleType("average")
    sys.modules["average"] = module
    source = SOURCE.replace("\n\n\ndef parameters", f"\n\n{change}\n\n\ndef parameters")
    exec(compile(source, "average", "exec"), module.__dict__)  # noqa: S102


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HANDLERS, "_registered", dict(HANDLERS._registered))


def go_on(
    world: DistributedContext,
    case: Case,
    folder: str,
    handlers: list[str],
    change: str = "",
    section: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train from what the folder holds, or the start, and save. Returns what the handler had at
    the start and at the end, by name, and what was logged."""
    before, messages = dict(HANDLERS._registered), []
    register(change)
    note, logger = logging.Handler(), logging.getLogger("torchtitan")
    note.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(note)
    try:
        case = Case(**{**vars(case), "settings": {"model": {"handlers": handlers}}})
        return _go_on(world, case, folder, section or {}) | {"log": " ".join(messages)}
    except (CheckpointError, HandlerError, TypeError) as error:
        return {"error": str(error)}
    finally:
        HANDLERS._registered = before
        logger.removeHandler(note)


def _go_on(
    world: DistributedContext, case: Case, folder: str, section: dict[str, Any]
) -> dict[str, Any]:
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    manager = CheckpointManager(
        Checkpoint(enable=True, **section), make_store(world, folder, **section), world
    )
    model = model_builder.build_model(config, tiny.VOCAB_SIZE, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    builder.load(manager, model, optimizers)
    found = {"start": contents(model.handlers)}
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    batches = tiny.microbatches_of(case, dims, world.rank)
    num_targets = int(CrossEntropyLoss().count(tiny.sequences()))
    for _ in range(STEPS):
        runner.forward_backward(batches, num_targets)
        for optimizer in optimizers:
            optimizer.step()
        for handler in model.handlers:
            handler.post_optimizer_hook(model.part_or_parts)
        for optimizer in optimizers:
            optimizer.zero_grad()
    parts, state = model.parts, RunState(manager.state.step + STEPS)
    manager.save(state, {}, parts, optimizers, False, False, handlers=model.handlers)
    found["end"] = contents(model.handlers)
    manager.wait_for_staging()
    for handler in model.handlers:
        for value in (handler.state_dict() or {}).values():
            if isinstance(value, Tensor):
                value.zero_()  # beside a save it has copies
    manager.wait()
    return found


def contents(handlers: list[NamedHandler]) -> dict[str, Any]:
    return {
        key: digest(value) if isinstance(value, Tensor) else value
        for handler in handlers
        for key, value in (handler.state_dict() or {}).items()
    }


def together(found: list[dict[str, Any]], when: str) -> dict[str, Any]:
    """What all ranks have; those that have the same must agree."""
    whole: dict[str, Any] = {}
    for rank in found:
        assert all(whole.get(key, value) == value for key, value in rank[when].items())
        whole |= rank[when]
    return whole


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Case(2), Case(2)),
        (Case(2, tp=2), Case(2, pp=2)),
        (Case(4, tp=2), Case()),
        (Case(2, pp=2), Case(2, replicate=2, shard=1)),
    ],
    ids=["fsdp", "tp-to-pp", "fsdp-tp-to-one", "pp-to-ddp"],
)
def test_it_moves_to_another_mesh_exactly(
    before: Case, after: Case, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    saved = gloo_pool.run(before.world_size, go_on, before, str(tmp_path), ["average"])
    resumed = gloo_pool.run(after.world_size, go_on, after, str(tmp_path), ["average"])
    end = together(saved, "end")
    assert end["steps"] == STEPS and end != together(saved, "start")
    assert len(end) == 2 * 9 + 3 + 1
    assert together(resumed, "start") == end
    assert together(resumed, "end")["steps"] == 2 * STEPS
    if before == after:
        whole = str(tmp_path / "whole")
        gloo_pool.run(2, go_on, before, whole, ["average"])
        again = gloo_pool.run(2, go_on, before, whole, ["average"])
        assert [rank["end"] for rank in again] == [rank["end"] for rank in resumed]


KINDS = """
    def after_load(self, model):
        self.weights = {name: w.detach().float().clone() for name, w in parameters(model)}
        self.more = {"scalar": torch.tensor(0.0), "empty": torch.zeros(0, 4)}
        self.more |= {"flags": torch.zeros(2, dtype=torch.bool), "turned": torch.zeros(3, 4).T}
        self.plain = {}

    def post_optimizer_hook(self, model):
        self.more["scalar"] += 1.5
        self.more["flags"][0] = True
        self.more["turned"] += torch.arange(12).view(4, 3)
        self.plain = {"a": [float("nan"), float("inf"), -0.0, 10**30, "\\u2028", None, True, 0.1]}

    def state_dict(self):
        return {**self.weights, **self.more, "plain": self.plain}

    def load_state_dict(self, state):
        self.plain = state["plain"]
"""


def test_any_kind_of_value(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Of another type than the weights, of no or no usual shape; numbers that are none."""
    saved = gloo_pool.run(2, go_on, Case(2), str(tmp_path), ["average"], KINDS)
    [resumed] = gloo_pool.run(1, go_on, Case(), str(tmp_path), ["average"], KINDS)
    assert repr(resumed["start"]) == repr(saved[0]["end"])
    assert "nan, inf, -0.0, 1000000000000" in repr(saved[0]["end"])


def test_it_is_copied_for_a_save_beside_training(gloo_pool: GlooPool, tmp_path: Path) -> None:
    arguments = Case(), str(tmp_path), ["average"], ""
    [saved] = gloo_pool.run(1, go_on, *arguments, {"async_mode": "async"})
    [resumed] = gloo_pool.run(1, go_on, *arguments)
    assert resumed["start"] == saved["end"]


@pytest.mark.parametrize(
    ("section", "comes_along"),
    [
        ({}, False),
        ({"initial_load_model_only": False}, True),
        ({"initial_load_model_only": False, "exclude_from_loading": ("handlers",)}, False),
    ],
    ids=["weights", "all", "excluded"],
)
def test_from_another_run(
    section: dict[str, Any], comes_along: bool, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    [saved] = gloo_pool.run(1, go_on, Case(), str(tmp_path / "old"), ["average"])
    section["initial_load_path"] = str(tmp_path / "old" / "step-2")
    [new] = gloo_pool.run(1, go_on, Case(), str(tmp_path / "new"), ["average"], "", section)
    assert (new["start"] == saved["end"]) == comes_along
    assert new["start"]["steps"] == (STEPS if comes_along else 0)
    assert ("starts without state" in new["log"]) == ("exclude_from_loading" in section)


def test_what_is_missing_is_said(gloo_pool: GlooPool, tmp_path: Path) -> None:
    [first] = gloo_pool.run(1, go_on, Case(), str(tmp_path), [])
    assert "handler" not in first["log"]
    [late] = gloo_pool.run(1, go_on, Case(), str(tmp_path), ["average"])
    assert f"The handler average starts without state: {tmp_path}/step-2 holds none" in late["log"]
    assert late["start"]["steps"] == 0
    [gone] = gloo_pool.run(1, go_on, Case(), str(tmp_path), [])
    assert (
        f"{tmp_path}/step-4 holds state of the handler average, which this run lacks" in gone["log"]
    )
    manifest = read_manifest(tmp_path / "step-6")
    assert not [name for name in manifest.tensors if "average" in name]


def lines(*texts: str) -> str:
    return "\n".join(f"    {text}" for text in texts)


WRONG = {
    "shape": (
        lines("kept = property(lambda s: {k: v[:1] for k, v in s.weights.items()})"),
        "does not fit the handlers: handler_state.average.",
    ),
    "tuple": (lines("kept = {'at': (1, 2)}"), "keeps at as (1, 2): state must consist of tensors"),
    "keys": (
        lines("kept = {'seen': {1: 2}}"),
        "keeps seen as {1: 2}: state must consist of tensors",
    ),
    "ranks": (
        lines("kept = property(lambda s: {'rank': torch.distributed.get_rank()})"),
        "the ranks keep different values of handler_state.average.rank",
    ),
    "parts": (
        lines("kept = property(lambda s: {'sum': torch.ones(2) * torch.distributed.get_rank()})"),
        "the ranks keep different values of handler_state.average.sum",
    ),
    "no-dict": (lines("kept = 3"), "in state_dict: TypeError: it has to return a dict with names"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_state_that_would_be_lost_ends_the_run_at_its_start(
    wrong: str, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    change, expected = WRONG[wrong]
    change += "\n" + lines("def state_dict(self):", "    return self.kept")
    if wrong == "shape":
        gloo_pool.run(2, go_on, Case(2), str(tmp_path), ["average"])
    for found in gloo_pool.run(2, go_on, Case(2), str(tmp_path), ["average"], change):
        assert expected in found["error"]


def test_both_hooks_or_none() -> None:
    register(lines("load_state_dict = ModelHandler.load_state_dict"))
    with pytest.raises(HandlerError, match="only one of state_dict and load_state_dict"):
        NamedHandler("average", Case().config(), ParallelDims())


def stored(step: Path) -> dict[str, Tensor]:
    tensors = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in read_manifest(step).tensors.items()
    }
    dcp.load(tensors, storage_reader=SafeReader(step), no_dist=True)
    return tensors


@pytest.mark.fault("F01")
def test_a_run_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And resumed has the average, to the bit, of one that was not."""
    (tmp_path / "average.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ("--job.custom_import=average", "--model.handlers=average")
    runs.run(tmp_path / "whole", *words)
    runs.run_killed(tmp_path / "run", *words)
    runs.run(tmp_path / "run", *words)
    steps = [tmp_path / name / "checkpoint" / "step-10" for name in ("whole", "run")]
    whole, run = map(stored, steps)
    assert "handler_state.average.layers.1.attention.wq.weight" in whole
    assert whole.keys() == run.keys()
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    assert read_manifest(steps[1]).state["handlers"] == {"average": {"steps": 10}}
