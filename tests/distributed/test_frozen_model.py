"""The reference below adapters, by the seam that handlers have for it, equals a frozen copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.tiny import Case, Result
from tests.parity.adapted import KINDS
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import register_handler
from torchtitan.models.norms import RMSNorm
from torchtitan.models.spec import InitRule


class ShiftedNorm(RMSNorm):
    """A norm with a trained shift of its output."""

    shift: nn.Parameter
    is_on: bool

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.shift if self.is_on else out


@register_handler("shifts")
class Shifts(ModelHandler):
    """Freezes the model and adds a shift before the head, which starts at zero."""

    adds_adapters = True

    def convert(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        norm = model.norm
        norm.__class__ = ShiftedNorm
        norm.shift = nn.Parameter(torch.empty_like(norm.weight))
        norm.is_on = True

    def init_rule(self, name: str) -> InitRule | None:
        return InitRule("constant") if name.endswith(".shift") else None

    @contextmanager
    def without_adapters(self, model: nn.Module | list[nn.Module]) -> Iterator[None]:
        parts = model if isinstance(model, list) else [model]
        found = [m for part in parts for m in part.modules() if isinstance(m, ShiftedNorm)]
        for module in found:
            module.is_on = False
        yield
        for module in found:
            module.is_on = True


def train_with_shifts(world: DistributedContext, case: Case) -> Result:
    return tiny.train(world, case)


MESHES = [{}, {"shard": 2}, {"cp": 2}, {"pp": 2}]
HANDLERS: dict[str, dict[str, Any]] = {
    "shifts": {"model": {"handlers": ["shifts"]}},
    "compiled": {
        "model": {"handlers": ["lora", "compile"]},
        "handlers": {"lora": KINDS["DoRA with dropout"], "compile": {"backend": "aot_eager"}},
        "activation_checkpoint": {"mode": "full"},
    },
    **{
        kind: {"model": {"handlers": ["lora"]}, "handlers": {"lora": KINDS[kind]}} for kind in KINDS
    },
}


def base_and_copy(
    pool: GlooPool,
    handler: str,
    mesh: dict[str, Any],
    references: tuple[str, ...] = ("base", "start"),
) -> list[list[Result]]:
    """All ranks' results with the reference below the adapters, and with a frozen copy."""
    results = []
    for reference in references:
        kind, _, cached = reference.partition(", ")
        args = {"beta": 0.5, "reference": kind} | ({"reference_cache": "x"} if cached else {})
        settings = {
            **HANDLERS[handler],
            "loss": {"name": "dpo", "args": args},
            "debug": {"seed": tiny.REFERENCE_SEED},  # the start is the reference
        }
        world_size = 2 if mesh else 1
        case = Case(world_size, document_mask=True, settings=settings, **mesh)
        results.append(pool.run(world_size, train_with_shifts, case))
    return results


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_base_equals_a_frozen_copy(gloo_pool: GlooPool, mesh: dict[str, Any]) -> None:
    """The copy has the handler, too, and its shift stays at zero."""
    [base, *_], [copy, *_] = base_and_copy(gloo_pool, "shifts", mesh)
    assert base.losses[0] == copy.losses[0] == pytest.approx(0.6931471805599453, rel=1e-15)
    assert base.losses == pytest.approx(copy.losses, rel=1e-12, abs=1e-15)
    assert base.evaluated == pytest.approx(copy.evaluated, rel=1e-12)
    assert base.losses[-1] > base.losses[1], "margins grow"


@pytest.mark.parametrize("kind", ["LoRA", "DoRA with dropout"])
def test_the_base_of_lora_equals_a_frozen_copy_on_every_mesh(
    gloo_pool: GlooPool, kind: str
) -> None:
    """B is not zero in the model in training, and zero in the copy."""
    alone: Result | None = None
    for mesh in ({}, {"shard": 2}, {"tp": 2}):
        base, copy = base_and_copy(gloo_pool, kind, mesh)
        alone = alone or base[0]
        assert abs(alone.losses[0] - 0.6931471805599453) > 1e-4, "the adapters count"
        assert tiny.compare(base, alone).worst < 1e-9
        assert tiny.compare(copy, alone).worst < 1e-9


def test_the_base_in_advance_equals_that_in_each_step(gloo_pool: GlooPool) -> None:
    kinds = ("base", "base, cached")
    [base, *_], [cached, *_] = base_and_copy(gloo_pool, "LoRA", {"shard": 2}, kinds)
    assert abs(base.losses[0] - 0.6931471805599453) > 1e-4, "the adapters count"
    assert cached.losses == pytest.approx(base.losses, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("mesh", [{}, {"shard": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_a_copy_in_advance_equals_one_in_each_step(
    gloo_pool: GlooPool, mesh: dict[str, Any]
) -> None:
    """The values of one process with a frozen copy, on any mesh without one."""
    results = []
    for more, place in (({}, {}), ({"reference_cache": "x"}, mesh)):
        args = {"name": "dpo", "args": {"beta": 0.5, **more}}
        size = 2 if place else 1
        case = Case(size, document_mask=True, microbatches=2, settings={"loss": args}, **place)
        results.append(gloo_pool.run(size, tiny.train, case))
    [alone], cached = results
    assert abs(alone.losses[0] - 0.6931471805599453) > 1e-4
    assert tiny.compare(cached, alone).worst < 1e-12


def test_compiled_blocks_leave_the_adapters_out(gloo_pool: GlooPool) -> None:
    kinds = ("DoRA with dropout", "compiled")
    plain, compiled = (base_and_copy(gloo_pool, kind, {}, ("base",))[0][0] for kind in kinds)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-9)
