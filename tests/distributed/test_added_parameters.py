"""What a handler adds to a model starts by the handler's rule, the same on every mesh, in the type
of the other weights and without memory of its own before it is allocated."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.tiny import Case, Part, Result
from tests.faults.saving import RUN_ID
from tests.pool import GlooPool
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.state import model_tensors
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import ConfigError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext, fake_world
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.named import HandlerError
from torchtitan.handlers.registry import HANDLERS, register_handler
from torchtitan.models.norms import RMSNorm
from torchtitan.models.spec import InitRule
from torchtitan.training import model_builder

MESHES = {
    "fsdp": Case(2),
    "ddp": Case(2, replicate=2, shard=1),
    "tp": Case(2, tp=2),
    "pp": Case(2, pp=2),
    "fsdp tp": Case(4, tp=2),
}
RULES = {
    "gain": InitRule("constant", value=1.0),
    "shift": InitRule("constant"),
    "mix": InitRule("normal", std=0.5),
    "twice": InitRule("constant", value=2.0),
}


class AffineNorm(RMSNorm):
    gain: Tensor
    shift: Tensor
    mix: Tensor
    twice: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * self.gain + self.shift + self.twice * self.mix * x.tanh()


class Affine(ModelHandler):
    """Makes its tensors as anybody would: without a device, and without a type."""

    def convert(self, model: Any) -> None:
        for block in model.blocks().values():
            norm = block.ffn_norm
            norm.__class__ = AffineNorm
            dim = norm.weight.numel()
            norm.gain, norm.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            norm.mix = nn.Parameter(torch.randn(dim))
            # Not in checkpoints: nothing else would give it values when one is loaded.
            norm.register_buffer("twice", torch.full((dim,), 2.0), persistent=False)
            assert {(t.device.type, t.dtype) for t in (*norm.parameters(), *norm.buffers())} == {
                ("meta", block.attention_norm.weight.dtype)
            }

    def init_rule(self, name: str) -> InitRule | None:
        return RULES.get(name.rpartition(".")[2])


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HANDLERS, "_registered", dict(HANDLERS._registered))


def built(case: Case, handlers: list[str], device: str = "cpu", initialise: bool = True) -> Any:
    config = case.config()
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"handlers": tuple(handlers)})}
    )
    dims = ParallelDims.from_section(config.parallelism, case.world_size)
    return model_builder.build_model(
        config, tiny.VOCAB_SIZE, dims.build_mesh("cpu"), dims, torch.device(device), initialise
    )


def start_and_train(world: DistributedContext, case: Case) -> tuple[dict[str, Part], Result]:
    """The values at the start, buffers too, and what becomes of them."""
    before = dict(HANDLERS._registered)
    register_handler("affine")(Affine)
    try:
        start, model = Result(), built(case, ["affine"])
        tiny.collect(model.parts, [], start)
        for part in model.parts:
            start.parameters |= {name: tiny._part_of(b) for name, b in part.named_buffers()}
        settings = {"model": {"handlers": ["affine"]}}
        return start.parameters, tiny.train(world, Case(**{**vars(case), "settings": settings}))
    finally:
        HANDLERS._registered = before


@pytest.fixture(scope="module")
def alone(gloo_pool: GlooPool) -> tuple[dict[str, Part], Result]:
    return gloo_pool.run(1, start_and_train, Case())[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_start_does_not_depend_on_the_mesh(
    mesh: str, gloo_pool: GlooPool, alone: tuple[dict[str, Part], Result]
) -> None:
    ranks = gloo_pool.run(MESHES[mesh].world_size, start_and_train, MESHES[mesh])
    assert set().union(*(start for start, _ in ranks)) == alone[0].keys()
    for name, part in (item for start, _ in ranks for item in start.items()):
        assert np.array_equal(part.values, alone[0][name].values[np.ix_(*part.indices)]), name
    assert tiny.compare([result for _, result in ranks], alone[1]).worst < 1e-9


def test_it_starts_by_the_rule(alone: tuple[dict[str, Part], Result]) -> None:
    start, _ = alone
    values = {kind: start[f"layers.1.ffn_norm.{kind}"].values for kind in RULES}
    assert {kind: set(values[kind]) for kind in ("gain", "shift", "twice")} == {
        "gain": {1.0},
        "shift": {0.0},
        "twice": {2.0},
    }
    mix = np.concatenate([start[f"layers.{n}.ffn_norm.mix"].values for n in range(2)])
    assert len(set(mix)) == mix.size and 0.3 < mix.std() < 0.7


def on_one(kind: type, dtype: str = "float32") -> Any:
    """A model on the meta device with the handler `kind`."""
    register_handler("kind")(kind)
    case = Case(settings={"training": dict.fromkeys(("dtype", "mixed_precision_param"), dtype)})
    with fake_world(0, 1):
        return built(case, ["kind"], device="meta", initialise=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_types_are_those_of_the_other_weights(dtype: str) -> None:
    assert {str(p.dtype) for p in on_one(Affine, dtype).parameters} == {f"torch.{dtype}"}


def test_what_has_no_rule_is_an_error() -> None:
    """Of buffers too. The model's own rule is not asked: many have one for every name."""

    class Silent(Affine):
        def init_rule(self, name: str) -> InitRule | None:
            return None if name.endswith(("mix", "twice")) else super().init_rule(name)

    with pytest.raises(ConfigError) as caught:
        on_one(Silent)
    text = str(caught.value)
    assert 'model.handlers = "kind": it adds layers.0.ffn_norm.mix, layers.1.ffn_norm.mix' in text
    assert "layers.0.ffn_norm.twice and 1 more" in text and "give the handler an init_rule" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda block: setattr(block, "table", torch.ones(3)), "layers.0.table is a tensor on the"),
        (lambda block: torch.arange(3).sum().item(), r"meta tensors.*unless.*device=\"cpu\""),
        (lambda block: setattr(block, "table", torch.ones(3, device="cpu")), None),
    ],
    ids=["kept", "read", "on-the-host"],
)
def test_values_that_convert_would_lose(change: Any, expected: str | None) -> None:
    """A handler that was written for real tensors learns what to do."""

    class Real(Affine):
        def convert(self, model: Any) -> None:
            for block in model.blocks().values():
                change(block)

    if expected is None:
        assert on_one(Real).parts[0].layers["0"].table.tolist() == [1, 1, 1]
    else:
        with pytest.raises(HandlerError, match=rf"the handler kind.*, in convert: .*{expected}"):
            on_one(Real)


@pytest.mark.parametrize("rule", ["ones", InitRule("constant", value=3.0), None])
def test_a_rule_may_be_for_any_parameter(rule: object) -> None:
    class Overriding(Affine):
        convert = ModelHandler.convert

        def init_rule(self, name: str) -> Any:
            return rule if name == "norm.weight" else None

    register_handler("kind")(Overriding)
    with fake_world(0, 1):
        if rule == "ones":
            with pytest.raises(HandlerError, match="in init_rule: TypeError: it returns 'ones'"):
                built(Case(), ["kind"])
            return
        model = built(Case(), ["kind"]).parts[0]
    assert set(model.norm.weight.full_tensor().tolist()) == {1.0 if rule is None else 3.0}


def save_plain(world: DistributedContext, folder: str) -> None:
    store = CheckpointStore(Checkpoint(enable=True), Path(folder), world, {"run_id": RUN_ID})
    store.save(1, model_tensors(built(Case(), []).parts), {}, model_only=True)


def start_from_plain(world: DistributedContext, path: str) -> tuple[dict[str, float], str]:
    """Means of what a handler adds to weights that lack it, and of something that they have."""
    before = dict(HANDLERS._registered)
    register_handler("affine")(Affine)
    logger, messages = logging.getLogger("torchtitan"), []
    note = logging.Handler()
    note.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(note)
    logger.setLevel(logging.INFO)
    try:
        model = built(Case(2), ["affine"], initialise=False)
        model.parts[0].norm.weight.data.fill_(7.0)
        initial = InitialLoad(Checkpoint(initial_load_path=path), world)
        initial.load(model_tensors(model.parts), {}, model.handlers)
    finally:
        HANDLERS._registered = before
        logger.removeHandler(note)
    tensors = model_tensors(model.parts) | dict(model.parts[0].named_buffers())
    names = ["norm.weight", *(f"layers.1.ffn_norm.{kind}" for kind in ("gain", "shift", "twice"))]
    means = {}
    for name in names:
        tensor: Any = tensors[name]
        whole = tensor if name.endswith("twice") else tensor.full_tensor()
        means[name.rpartition(".")[2]] = whole.mean().item()
    return means, " ".join(messages)


def test_weights_that_lack_it_can_be_started_from(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(1, save_plain, str(tmp_path))
    for means, told in gloo_pool.run(2, start_from_plain, str(tmp_path / "step-1")):
        assert means == {"weight": 1.0, "gain": 1.0, "shift": 0.0, "twice": 2.0}
        assert "Initialised 6 tensors that handlers add" in told
