"""Weights of other programs on meshes: each rank fills its own slices, equal to the whole's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed.tiny import Case
from tests.foreign import args_of, random_weights, write_hf, write_meta
from tests.pool import GlooPool
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.state import fill_copies, model_tensors
from torchtitan.config import CheckpointError
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import local_indices
from torchtitan.training import model_builder
from torchtitan.utils.torch_compat import local_tensor
from torchtitan.weights.source import WeightSource, open_weights


def load(world: DistributedContext, path: str, case: Case, args: DecoderArgs) -> dict[str, Any]:
    """Load into an uninitialised model of the mesh, and compare with the whole weights."""
    config = case.config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    mesh = dims.build_mesh("cpu")
    assert args.vocab_size is not None
    model = model_builder.build_model(
        config, args.vocab_size, mesh, dims, world.device, initialise=False
    )
    opened: list[WeightSource] = []

    def open_foreign(folder: Path) -> WeightSource:
        opened.append(open_weights(folder, get_family(case.family), args))
        return opened[0]

    section = Checkpoint(enable=True, initial_load_path=path)
    tensors = model_tensors(model.parts)
    try:
        InitialLoad(section, world, open_foreign).load(tensors, {})
    except CheckpointError as error:
        return {"error": str(error)}
    fill_copies(model.parts, [])
    whole = random_weights(args, case.family)
    held, sharded = 0, False
    for part in model.parts:
        for name, parameter in part.named_parameters():
            local = local_tensor(parameter.detach())
            where = torch.meshgrid(local_indices(parameter), indexing="ij")
            assert torch.equal(local, whole[name].double()[where]), name
            held += local.numel()
            sharded |= isinstance(parameter, DTensor) and local.shape != parameter.shape
    return {"held": held, "bytes": opened[0].bytes_read, "sharded": sharded}


def load_own(world: DistributedContext, paths: list[str], *rest: Any) -> dict[str, Any]:
    """The same from a folder of each rank's own."""
    return load(world, paths[world.rank], *rest)


SIZES = {"head_dim": 6, "ffn_dim": 90}
MESHES = {
    "fsdp 2": Case(2, heads=9, kv_heads=3),
    "hsdp 2 x 2": Case(4, replicate=2, shard=2, heads=9, kv_heads=3),
    "tp 2": Case(2, tp=2, heads=4, kv_heads=2),
    "tp 3": Case(3, tp=3, heads=9, kv_heads=3),
    "tp 4, 2 kv heads": Case(4, tp=4, heads=8, kv_heads=2),
    "fsdp 2 x tp 2": Case(4, tp=2, heads=6, kv_heads=2),
    "pp 2, tied": Case(2, pp=2, microbatches=2, heads=9, kv_heads=3, tied=True),
    "fsdp 2 x pp 2, qwen3": Case(4, pp=2, microbatches=2, heads=9, kv_heads=3, family="qwen3"),
}


def with_sizes(case: Case) -> tuple[Case, DecoderArgs]:
    sizes = SIZES | ({"ffn_dim": 92} if case.tp == 4 else {})
    case.args.update(sizes)
    heads = {"n_heads": case.heads, "n_kv_heads": case.kv_heads, "tied_embeddings": case.tied}
    return case, args_of(case.family, **heads, **sizes)


@pytest.mark.parametrize("mesh", MESHES)
def test_slices_of_a_hugging_face_folder(gloo_pool: GlooPool, tmp_path: Path, mesh: str) -> None:
    case, args = with_sizes(MESHES[mesh])
    weights = random_weights(args, case.family)
    write_hf(tmp_path, weights, args, case.family, num_shards=3)
    results = gloo_pool.run(case.world_size, load, str(tmp_path), case, args)
    total = sum(weight.numel() for weight in weights.values())
    assert all(result["sharded"] or case.pp > 1 for result in results), results
    if mesh == "fsdp 2":  # a shard that ends within a head reads the rest of that head
        part_heads = 2 * args.n_layers * 6 * 32
        assert all(result["bytes"] <= 4 * (result["held"] + part_heads) for result in results)
        assert sum(result["held"] for result in results) == total


def test_slices_of_metas_parts(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Parts that are no rank's: tensors are joined along other dimensions than FSDP's."""
    case, _ = with_sizes(Case(4, tp=2, heads=8, kv_heads=4))
    args = args_of(n_heads=8, n_kv_heads=4, vocab_size=132, **SIZES)
    write_meta(tmp_path, random_weights(args), 2)
    for result in gloo_pool.run(4, load, str(tmp_path), case, args):
        assert result["sharded"], result


def test_a_flaw_ends_every_rank(gloo_pool: GlooPool, tmp_path: Path) -> None:
    case, args = with_sizes(MESHES["fsdp 2"])
    write_hf(tmp_path, random_weights(args), args, num_shards=3)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-9])
    one, other = gloo_pool.run(2, load, str(tmp_path), case, args)
    assert one == other and f"{file.name}: cannot be read" in one["error"]
    # A branch of the hub that moved between the downloads of two machines.
    commits = [tmp_path / "a" / "snapshots" / "1ce1", tmp_path / "b" / "snapshots" / "2ce2"]
    for folder in commits:
        write_hf(folder, random_weights(args), args)
    for result in gloo_pool.run(2, load_own, [str(folder) for folder in commits], case, args):
        assert "2ce2 is not the commit that rank 0 has, 1ce1" in result["error"]
    write_hf(tmp_path / "other", random_weights(args_of(dim=64)), args_of(dim=64))
    one, other = gloo_pool.run(2, load, str(tmp_path / "other"), case, args)
    assert one == other and "is float64 [131, 64] in it" in one["error"]
