"""Initial weights are the same bits however they are cut, and are distributed as the rule says."""

import hashlib
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan.models.spec import InitRule
from torchtitan.parallel import initialize
from torchtitan.parallel.initialize import initialize_parameters

SHAPES = [(16, 8), (13, 8), (10, 7), (131, 6), (3, 5), (1, 9), (7,), (4, 5, 6)]
CUT = InitRule("normal", std=0.02, cutoff_in_std=3.0)


class Holder(nn.Module):
    """A model of bare parameters."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.full(shape, math.nan, dtype=dtype)) for shape in shapes]
        )


class TwoLayers(nn.Module):
    """Linear layers to cut by columns and by rows, of sizes that do not divide."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 13, bias=False)
        self.second = nn.Linear(13, 3, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def fill(model: nn.Module, rule: InitRule = CUT, seed: int = 0) -> dict[str, torch.Tensor]:
    initialize_parameters(model, lambda name: rule, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_placements(world) -> int:
    """Every pair of placements of every shape on a 2 x 2 mesh gives the bits of no mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = fill(Holder(*SHAPES))
    empty_shards = 0
    for index, shape in enumerate(SHAPES):
        kinds = [Replicate(), *(Shard(axis) for axis in range(len(shape)))]
        for placements in [(a, b) for a in kinds for b in kinds]:
            model = Holder(*SHAPES)
            cut = distribute_tensor(torch.full(shape, math.nan), mesh, placements)
            model.weights[index] = nn.Parameter(cut)
            filled = fill(model)[f"weights.{index}"]
            empty_shards += filled.to_local().numel() == 0
            assert torch.equal(filled.full_tensor(), whole[f"weights.{index}"]), (shape, placements)
    return empty_shards


def check_sharded_models(world) -> list[str]:
    """FSDP2, HSDP and FSDP2 over tensor parallelism, allocated after construction on meta."""
    whole, kinds = fill(TwoLayers()), set()
    for shape, names in (((4,), ("fsdp",)), ((2, 2), ("copies", "fsdp")), ((2, 2), ("fsdp", "tp"))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        with torch.device("meta"):
            model = TwoLayers()
        if "tp" in names:
            plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["fsdp"] if "tp" in names else mesh)
        model.to_empty(device="cpu")
        for name, filled in fill(model).items():
            assert isinstance(filled, DTensor)
            kinds |= {type(placement).__name__ for placement in filled.placements}
            assert torch.equal(filled.full_tensor(), whole[name]), (names, name)
    return sorted(kinds)


def test_any_placement_gives_the_same_bits(gloo_pool):
    empty_shards = gloo_pool.run(4, check_placements)
    assert sum(empty_shards) > 0, "no case had an empty shard"


def test_sharded_models_get_the_same_bits(gloo_pool):
    [kinds, *_] = gloo_pool.run(4, check_sharded_models)
    assert kinds == ["Replicate", "Shard", "_StridedShard"]


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    whole = fill(Holder(*SHAPES))
    monkeypatch.setattr(initialize, "_CHUNK", 5)
    chunked = fill(Holder(*SHAPES))
    assert all(torch.equal(chunked[name], whole[name]) for name in whole)


@pytest.mark.parametrize("cutoff", [None, 3.0, 1.0])
def test_distribution(cutoff):
    std = 0.5
    rule = InitRule("normal", std=std, cutoff_in_std=cutoff)
    values = fill(Holder((1000, 1000), dtype=torch.float64), rule)["weights.0"].flatten() / std
    normal = torch.distributions.Normal(0.0, 1.0)
    points = torch.linspace(-2.9, 2.9, 25, dtype=torch.float64)
    expected = normal.cdf(points)
    if cutoff is not None:
        assert values.abs().max() <= cutoff
        outside = normal.cdf(torch.tensor(-cutoff, dtype=torch.float64))
        expected = ((expected - outside) / (1 - 2 * outside)).clamp(0, 1)
    else:
        assert values.abs().max() > 4
    measured = torch.searchsorted(values.sort().values, points) / len(values)
    assert (measured - expected).abs().max() < 2e-3  # 4 standard errors of a million values
    for shift in (1, 1000):  # neighbours in a row and in a column
        correlation = torch.corrcoef(torch.stack([values[shift:], values[:-shift]]))[0, 1]
        assert abs(correlation) < 4e-3


def test_every_element_has_its_own_value():
    for shape in ((60,), (6, 10), (3, 4, 5), (2, 3, 2, 5)):
        values = fill(Holder(shape, dtype=torch.float64))["weights.0"].flatten()
        assert len(values.unique()) == 60
        assert torch.equal(values, fill(Holder((60,), dtype=torch.float64))["weights.0"])


def test_seed_and_name_matter():
    first, other_seed = fill(Holder((50, 50), (50, 50))), fill(Holder((50, 50)), seed=1)
    assert (first["weights.0"] == first["weights.1"]).sum() < 5
    assert (first["weights.0"] == other_seed["weights.0"]).sum() < 5
    again = fill(Holder((50, 50), (50, 50)))
    assert torch.equal(first["weights.1"], again["weights.1"])


def test_values_follow_the_published_hash():
    """Against SplitMix64 in plain integers: what is promised across versions and devices."""
    mask = (1 << 64) - 1
    state = int.from_bytes(hashlib.sha256(b"7/weights.0").digest()[:8], "little")
    expected = []
    for index in range(6):
        z = (state + index * 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        signed = z - (1 << 64) if z >> 63 else z
        uniform = ((signed >> 10) | 1) / 2**53
        expected.append(math.sqrt(2) * torch.erfinv(torch.tensor(uniform, dtype=torch.float64)))
    filled = fill(Holder((2, 3), dtype=torch.float64), InitRule("normal", std=1.0), seed=7)
    torch.testing.assert_close(filled["weights.0"].flatten(), torch.stack(expected))


def test_types_constants_and_tied_parameters():
    rule = InitRule("normal", std=1.0)
    wide = fill(Holder((9, 9), dtype=torch.float64), rule)["weights.0"]
    narrow = fill(Holder((9, 9), dtype=torch.bfloat16), rule)["weights.0"]
    assert torch.equal(wide.to(torch.bfloat16), narrow)
    assert fill(Holder((5,)), InitRule("constant", value=1.0))["weights.0"].tolist() == [1.0] * 5
    tied = TwoLayers()
    tied.second = nn.Linear(7, 13, bias=False)
    tied.second.weight = tied.first.weight
    assert torch.equal(fill(tied)["first.weight"], fill(TwoLayers())["first.weight"])


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = TwoLayers()
    with pytest.raises(ValueError, match=r"first.weight is on the meta device"):
        fill(model)


def test_buffers_of_any_shape_and_type():
    """A handler may add such: a scalar is like a vector of one; integers would be cut off."""
    scalar, vector, count = torch.zeros(()), torch.zeros(1), torch.zeros(2, dtype=torch.int64)

    def fill(tensor, rule):
        initialize.initialize_tensors([("x", tensor)], lambda name: rule, seed=1)

    for tensor in (scalar, vector):
        fill(tensor, InitRule("normal", std=1.0))
    assert scalar == vector[0] != 0
    fill(count, InitRule("constant", value=2.0))
    assert count.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"x is torch\.int64: it can only start with a constant"):
        fill(count, InitRule("normal", std=1.0))
