"""Handlers that make linears compute in another format: on every mesh, and from one to another."""

from pathlib import Path

import pytest

from tests.distributed.low_precision import VARIANTS, Trained, case_of, train
from tests.pool import GlooPool

STEPS = 20
CLASSES = {
    "float8": "Float8Linear",
    "int8": "Int8Linear",
    "bitnet": "BitNetLinear",
    "mxfp8": "Mxfp8Linear",
}
MESHES = {
    "fsdp 2": {"shard": 2},
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2},
}


def losses(pool: GlooPool, variant: str | None, **mesh: int) -> list[float]:
    case = case_of(variant, **mesh)
    [first, *_] = pool.run(case.world_size, train, case, STEPS)
    return first.losses


@pytest.fixture(scope="module")
def plain(gloo_pool: GlooPool) -> Trained:
    """In bfloat16, on one process."""
    [trained] = gloo_pool.run(1, train, case_of(None), STEPS)
    return trained


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", ["one process", *MESHES])
def test_it_trains(variant: str, mesh: str, plain: Trained, gloo_pool: GlooPool) -> None:
    if (variant, mesh) == ("bitnet", "tp 2"):
        pytest.skip("refused by the check: tests/unit/handlers/test_low_precision.py")
    case = case_of(variant, **MESHES.get(mesh, {}))
    trained = gloo_pool.run(case.world_size, train, case, STEPS)
    for rank in trained:
        print(variant, mesh, rank.losses[0], rank.losses[-1], plain.losses[0], plain.losses[-1])
        assert rank.losses[-1] < rank.losses[0] - 1
        assert all(kind.endswith(CLASSES[VARIANTS[variant][0]]) for kind in rank.kinds)
    names = {name: shape for rank in trained for name, shape in rank.names.items()}
    assert names == plain.names


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_on_on_another_mesh(variant: str, tmp_path: Path, gloo_pool: GlooPool) -> None:
    """Weights and moments are the same there, so the loss is."""
    case = case_of(variant, shard=2)
    gloo_pool.run(2, train, case, 5, str(tmp_path), True)
    [here, _] = gloo_pool.run(2, train, case, 3, str(tmp_path))
    other = {"pp": 2} if variant == "bitnet" else {"tp": 2}
    for mesh in ({}, other):
        case = case_of(variant, **mesh)
        there = gloo_pool.run(case.world_size, train, case, 3, str(tmp_path))
        print(variant, mesh, here.losses, there[0].losses)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", [{}, {"shard": 2}, {"shard": 2, "tp": 2}], ids=str)
def test_it_compiles(variant: str, mesh: dict[str, int], gloo_pool: GlooPool) -> None:
    if variant == "bitnet" and "tp" in mesh:
        pytest.skip("refused")
    case = case_of(variant, compiled=True, **mesh)
    plain = case_of(variant, **mesh)
    compiled = gloo_pool.run(case.world_size, train, case, 3)
    expected = gloo_pool.run(case.world_size, train, plain, 3)
    print(variant, mesh, compiled[0].losses, expected[0].losses, compiled[0].num_graphs)
