"""Built-in handlers train on every mesh, and go on from one to another."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.low_precision import (
    FULL_PRECISION,
    VARIANTS,
    Trained,
    case_of,
    curve,
    train,
)
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.parallel.tensor_parallel import TensorGroup, gather_sequence

STEPS = 20
CLASSES = {
    "float8": "Float8Linear",
    "int8": "Int8Linear",
    "bitnet": "BitNetLinear",
    "mxfp8": "Mxfp8Linear",
}
MESHES = {"one process": {}, "fsdp 2": {"shard": 2}, "tp 2": {"tp": 2}, "pp 2": {"pp": 2}}
ROUNDING = 1e-4
"""Of a loss, relative: another mesh rounds other tensors together, on the same weights. It was at
most 2e-5."""
NIGHTLY = {"rowwise_with_gw_hp", "emulated"}
"""Variants of `float8` that differ from others in one product only."""
CUT_NIGHTLY = {(variant, "pp 2") for variant in ("rowwise", "sent in float8")}
"""By day each handler is cut into stages once."""
MOVED_NIGHTLY = NIGHTLY | {"tensorwise", "rowwise"}
"""`sent in float8` has the state of these and more."""
COMPILED_NIGHTLY = {
    *((variant, "fsdp 2") for variant in ("tensorwise", "rowwise", "bitnet", "mxfp8 emulated")),
    *((variant, "tp 2") for variant in ("int8", "tensorwise")),
}
Once = Callable[[str | None, str], list[Trained]]


@pytest.fixture(scope="module")
def trained(gloo_pool: GlooPool) -> Once:
    """What the ranks of a mesh see; each is trained once."""
    known: dict[tuple[str | None, str], list[Trained]] = {}

    def train_once(variant: str | None, mesh: str) -> list[Trained]:
        if (variant, mesh) not in known:
            case = case_of(variant, **MESHES[mesh])
            ranks = gloo_pool.run(case.world_size, train, case, STEPS, timeout=200)
            known[variant, mesh] = ranks
        return known[variant, mesh]

    return train_once


def compared(trained: Once, variant: str, mesh: str) -> tuple[list[Trained], Trained, Trained]:
    """The ranks of a mesh; one process, with which they end, but for rounding; and one with plain
    linears, whose names and shapes they have."""
    ranks, [one], [plain] = (
        trained(variant, mesh),
        trained(variant, "one process"),
        trained(None, "one process"),
    )
    assert {name: shape for rank in ranks for name, shape in rank.names.items()} == plain.names
    for rank in ranks:
        assert rank.losses[-1] == pytest.approx(one.losses[-1], rel=5e-3)
    return ranks, one, plain


def nightly(*values: str) -> Any:
    """A case that takes too long for every change."""
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        nightly(v, m) if v in NIGHTLY or (v, m) in CUT_NIGHTLY else (v, m)
        for v, m in product(VARIANTS, MESHES)
    ],
)
def test_it_trains(variant: str, mesh: str, trained: Once) -> None:
    """As on one process, but for rounding; with the names and shapes of plain linears."""
    ranks, one, plain = compared(trained, variant, mesh)
    for rank in ranks:
        assert rank.losses[-1] < rank.losses[0] - 2
        assert rank.losses[0] == pytest.approx(one.losses[0], rel=ROUNDING)
        assert all(kind.endswith(CLASSES[VARIANTS[variant][0]]) for kind in rank.kinds)
        assert rank.kinds and rank.losses[0] != plain.losses[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", FULL_PRECISION)
def test_the_others_train(variant: str, mesh: str, trained: Once) -> None:
    ranks, one, plain = compared(trained, variant, mesh)
    for rank in ranks:
        assert rank.losses[-1] < rank.losses[0] - 1
        assert rank.losses[0] == pytest.approx(plain.losses[0], rel=ROUNDING)
        assert (rank.num_graphs > 0) == (variant == "compile")
    assert (one.losses[-1] == pytest.approx(plain.losses[-1], rel=5e-3)) == (variant != "freeze")


@pytest.mark.parametrize(
    "variant", [nightly(v) if v in MOVED_NIGHTLY else v for v in VARIANTS | FULL_PRECISION]
)
def test_it_goes_on_on_another_mesh(
    variant: str, trained: Once, tmp_path: Path, gloo_pool: GlooPool
) -> None:
    """There with the same loss, but for rounding; on the same mesh to the bit."""
    whole = trained(variant, "fsdp 2")[0].losses
    case = case_of(variant, shard=2)
    gloo_pool.run(2, train, case, 5, str(tmp_path), True)
    assert gloo_pool.run(2, train, case, 2, str(tmp_path))[0].losses == whole[5:7]
    for mesh in ("one process", "tp 2"):
        case = case_of(variant, **MESHES[mesh])
        [there, *_] = gloo_pool.run(case.world_size, train, case, 1, str(tmp_path))
        assert there.losses[0] == pytest.approx(whole[5], rel=ROUNDING)


def test_scales_found_together_are_those_of_a_resumed_run(
    tmp_path: Path, gloo_pool: GlooPool
) -> None:
    """They are of whole matrices, and FSDP alone would find those of the parts of each rank."""
    case = case_of("sent in float8", shard=2, tp=2)
    [whole, *_] = gloo_pool.run(4, train, case, 3, str(tmp_path / "none"), timeout=200)
    gloo_pool.run(4, train, case, 1, str(tmp_path / "saved"), True, timeout=200)
    [rest, *_] = gloo_pool.run(4, train, case, 2, str(tmp_path / "saved"), timeout=200)
    assert rest.losses == whole.losses[1:]
    for trained in (whole, rest):
        assert len(trained.scales) == 14 and all(trained.scales)


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("sent in float8", "fsdp 2"),
        ("int8", "fsdp 2"),
        ("bitnet", "tp 2"),
        ("emulated", "one process"),
        *(nightly(*pair) for pair in sorted(COMPILED_NIGHTLY)),
    ],
)
def test_it_compiles(variant: str, mesh: str, trained: Once, gloo_pool: GlooPool) -> None:
    """One graph for all blocks, which gives the same losses."""
    case = case_of(variant, compiled=True, **MESHES[mesh])
    ranks = gloo_pool.run(case.world_size, train, case, 2, timeout=200)
    expected = trained(variant, mesh)[0].losses
    for rank in ranks:
        assert rank.num_graphs == 1
        assert rank.losses == pytest.approx(expected[:2], rel=ROUNDING)


# The sequence in float8


class Gathers(TorchDispatchMode):
    """Counts what is gathered, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.types: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if function is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.types[str(args[0].dtype)] += 1
        return function(*args, **(kwargs or {}))


def gather_both_ways(world: DistributedContext, emulate: bool) -> tuple[Counter[str], list[Tensor]]:
    """Bits, scale, output and gradients: rounded, then gathered; and gathered, then rounded."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    from torchtitan.handlers.float8 import _GatherFloat8

    torch.manual_seed(0)
    linear = Float8Linear(32, 16, bias=False, config=Float8LinearConfig(emulate=emulate))
    linear.to(torch.bfloat16)
    weight = torch.randn(16, 32, dtype=torch.bfloat16)
    assert dist.group.WORLD is not None
    group = TensorGroup(dist.group.WORLD.group_name, world.world_size, world.rank)
    torch.manual_seed(world.rank)  # so that the ranks' largest numbers differ
    part = torch.randn(2, 8, 32, dtype=torch.bfloat16)
    found: list[Tensor] = []
    counts: Counter[str] = Counter()
    for rounds_first in (True, False):
        x = part.clone().requires_grad_()
        linear.weight = torch.nn.Parameter(weight.clone())
        with Gathers() as gathers:
            if rounds_first:
                options = linear.linear_mm_config
                gathered = _GatherFloat8.apply(
                    x, group.name, group.size, options, torch.float8_e4m3fn
                )
            else:
                gathered = gather_sequence(x, group)
        counts += gathers.types
        out = linear(gathered)
        (out * torch.arange(16)).sum().backward()
        assert x.grad is not None and linear.weight.grad is not None
        found += [out.detach(), x.grad, linear.weight.grad]
    return counts, found


@pytest.mark.parametrize("emulate", [False, True])
def test_rounding_before_the_gather_changes_nothing(emulate: bool, gloo_pool: GlooPool) -> None:
    for counts, found in gloo_pool.run(2, gather_both_ways, emulate):
        assert counts == {"torch.uint8": 1, "torch.bfloat16": 1}
        for one, other in zip(found[:3], found[3:], strict=True):
            assert torch.equal(one, other)
            assert one.abs().max() > 0


# The scale of a matrix in parts


def ternary_parts(world: DistributedContext, compiled: bool) -> list[Tensor]:
    """Output and gradients by this rank's half of the rows, and by the same rows of the whole."""
    from torchtitan.handlers.bitnet import BitNetLinear

    torch.manual_seed(0)
    weight = torch.randn(32, 16) * torch.tensor([1.0, 5.0]).repeat_interleave(16).unsqueeze(1)
    x = torch.randn(16, 16)
    assert dist.group.WORLD is not None
    group = TensorGroup(dist.group.WORLD.group_name, world.world_size, world.rank)
    rows = slice(16 * world.rank, 16 * world.rank + 16)
    found: list[Tensor] = []
    for is_cut in (True, False):
        linear = BitNetLinear(16, 16 if is_cut else 32, bias=False)
        linear.weight = torch.nn.Parameter(weight[rows].clone() if is_cut else weight.clone())
        linear.group = group if is_cut else None
        out = (torch.compile(linear, backend="aot_eager") if compiled else linear)(x)
        out.square().sum().backward()
        assert linear.weight.grad is not None
        both = [out.detach().T, linear.weight.grad]
        found += both if is_cut else [tensor[rows] for tensor in both]
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cut_matrix_has_the_scale_of_the_whole(compiled: bool, gloo_pool: GlooPool) -> None:
    """Halves of very different magnitudes would have others."""
    for out, grad, expected_out, expected_grad in gloo_pool.run(2, ternary_parts, compiled):
        torch.testing.assert_close(out, expected_out, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
        assert out.abs().max() > 1


# What rounding costs


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["tensorwise", "rowwise", "rowwise_with_gw_hp", "int8"])
def test_the_loss_is_within_2_percent_of_bfloat16(variant: str, gloo_pool: GlooPool) -> None:
    """After 200 steps of the debug model: docs/guides/low_precision.md has the figures."""
    [plain] = gloo_pool.run(1, curve, None, timeout=600)
    [rounded] = gloo_pool.run(1, curve, variant, timeout=600)
    assert plain.last < plain.losses[0] - 1.5
    assert rounded.last == pytest.approx(plain.last, rel=0.02)
