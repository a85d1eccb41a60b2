"""Optimizers whose steps are not element by element, and frozen parameters: on shards that are
uneven or empty, and from one mesh to another through a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.distributed.tiny import Case
from tests.parity.table import (
    ADAFACTOR,
    BF16_STATE,
    EIGHT_BITS,
    FROZEN_START,
    MUON,
    SGD,
    name_of,
    reference_of,
    row,
)
from tests.parity.test_checkpoints_move import LAST_STEP, SAVED_STEP, go_on, together
from tests.pool import GlooPool
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.optim.optimizer import build_optimizers

SECTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"name": "Muon", "args": {"patterns": ["*.weight"]}},
    "Adafactor": {"name": "Adafactor"},
}
MOVES = [
    (row(MUON, shard=2, tp=2, layers=4), row(MUON, pp=2, layers=4)),
    (row(ADAFACTOR, shard=4), row(ADAFACTOR, replicate=2, tp=2)),
    (row(SGD, shard=2), row(SGD, tp=2)),
    (row(BF16_STATE, tp=2), row(BF16_STATE, shard=4)),
    (row(EIGHT_BITS, shard=2, tp=2), row(EIGHT_BITS, replicate=2)),
    (row(FROZEN_START, pp=2, layers=4), row(FROZEN_START, shard=2, tp=2, layers=4)),
]


def train(model: nn.Module, kind: str, sharded: bool) -> dict[str, torch.Tensor]:
    section = Optimizer(lr=0.1, param_groups=(), **SECTIONS[kind])
    [optimizer] = build_optimizers(section, [model], torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for param in model.parameters():
            full = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = (
                distribute_tensor(full, param.device_mesh, param.placements) if sharded else full
            )
        optimizer.step()
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {n: p.full_tensor() if sharded else p for n, p in params.items()}


def build() -> nn.Module:
    torch.manual_seed(0)
    # 5 and 3 rows over 4 ranks: some have none.
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)).double()


def train_sharded(world: DistributedContext, kind: str) -> dict[str, torch.Tensor]:
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
    return train(model, kind, sharded=True)


@pytest.mark.parametrize("kind", SECTIONS)
def test_uneven_and_empty_shards(gloo_pool: GlooPool, kind: str) -> None:
    expected = train(build(), kind, sharded=False)
    for found in gloo_pool.run(4, train_sharded, kind):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize(("before", "after"), MOVES, ids=name_of)
def test_a_run_moves(before: Case, after: Case, gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Every tensor comes along to the bit, and the run goes on as on one process."""
    alone, folder = reference_of(before), str(tmp_path / "saved")
    [expected] = gloo_pool.run(1, go_on, alone, str(tmp_path / "alone"), LAST_STEP, False)
    legs = gloo_pool.run(before.world_size, go_on, before, folder, SAVED_STEP, True)
    content = together([leg.content for leg in legs])
    assert content.keys() == expected.content.keys()
    legs = gloo_pool.run(after.world_size, go_on, after, folder, LAST_STEP, False)
    assert together([leg.loaded for leg in legs]) == content
    for leg in legs:
        for step in range(SAVED_STEP + 1, LAST_STEP + 1):
            assert leg.losses[step] == pytest.approx(expected.losses[step], rel=1e-9)
            assert leg.norms[step] == pytest.approx(expected.norms[step], rel=1e-9)
    of_start = [name for name in content if name.startswith("optimizer.tok_embeddings")]
    assert bool(of_start) == ("handlers" not in before.settings)
