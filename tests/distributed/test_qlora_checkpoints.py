"""A quantised base is made of the stored one by slices, on any mesh, at every start."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed.adapted_runs import Leg, on, train, write_base
from tests.distributed.tiny import Case
from tests.pool import GlooPool
from torchtitan.checkpoint import initial_load
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.manifest import read_manifest
from torchtitan.distributed.context import DistributedContext
from torchtitan.handlers.quantised import dequantize, quantize
from torchtitan.training.adapters import AdaptedModel, open_adapted
from torchtitan.training.export import Target, write_adapter, write_model
from torchtitan.weights.readback import divergence, probe
from torchtitan.weights.stored_model import read_tensors

LARGE = {"dim": 128, "ffn_dim": 256}


def case_of(mesh: Mapping[str, int] | None = None, float32: bool = False, **settings: Any) -> Case:
    sections: dict[str, dict[str, Any]] = {
        "model": {"handlers": ["qlora"]},
        "handlers": {"qlora": {"rank": 4, "alpha": 8.0, **settings}},
        "optimizer": {"lr": 0.01},
    }
    if float32:
        kinds = ("dtype", "mixed_precision_param", "mixed_precision_reduce")
        sections["training"] = dict.fromkeys(kinds, "float32")
    return replace(Case(shard=1, settings=sections, args=LARGE), **(mesh or {}))


ONE = case_of(dora=True)
MESHES = {
    "TP 2": {"tp": 2, "world_size": 2},
    "PP 2": {"pp": 2, "world_size": 2},
    "FSDP 2 x TP 2": {"shard": 2, "tp": 2, "world_size": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the model."""
    return write_base(tmp_path_factory.mktemp("base") / "hf", ONE)


@pytest.fixture(scope="module")
def alone(gloo_pool: GlooPool, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Leg:
    """One process that is not interrupted."""
    [leg] = on(gloo_pool, ONE, tmp_path_factory.mktemp("alone"), base, 6)
    assert not leg.error
    return leg


def whole(legs: list[Leg], name: str) -> dict[str, str]:
    tensors: dict[str, str] = {}
    for leg in legs:
        assert not leg.error, leg.error
        tensors |= getattr(leg, name)
    return tensors


def quantised(tensors: dict[str, str]) -> dict[str, str]:
    found = {n: d for n, d in tensors.items() if n.endswith(("weight_nf4", "weight_scale"))}
    assert len(found) == 2 * 7 * 2
    return found


def test_a_run_moves_over_meshes(
    gloo_pool: GlooPool, base: Path, alone: Leg, tmp_path: Path
) -> None:
    """With the same bytes on each, and checkpoints without them."""
    losses, before = [], None
    for last, mesh in zip((2, 4, 6), MESHES.values(), strict=True):
        legs = on(gloo_pool, case_of(mesh, dora=True), tmp_path, base, last)
        losses += legs[0].losses
        loaded = whole(legs, "loaded")
        assert quantised(loaded) == quantised(alone.content)
        assert before is None or loaded == before
        before = whole(legs, "content")
        tensors = read_manifest(tmp_path / f"step-{last}").tensors
        assert all("lora_" in name or "magnitude" in name for name in tensors)
    assert losses == pytest.approx(alone.losses, rel=1e-10)


def test_the_base_may_be_a_step(
    gloo_pool: GlooPool, alone: Leg, base: Path, tmp_path: Path
) -> None:
    """A step of a run without adapters: DCP's format, read by all ranks together."""
    plain = Case(shard=1, args=LARGE)
    [leg] = on(gloo_pool, plain, tmp_path / "plain", base, 1)
    assert not leg.error
    found = []
    for name, mesh in MESHES.items():
        step = tmp_path / "plain" / "step-1"
        legs = on(gloo_pool, case_of(mesh), tmp_path / name, step, 1)
        found.append(quantised(whole(legs, "loaded")))
    assert found[0] == found[1] == found[2]
    assert found[0] != quantised(alone.content)  # it was trained meanwhile


def load_few(world: DistributedContext, folder: str, base: str) -> tuple[Leg, list[int]]:
    """Train with room for two matrices; returns the elements of each load, too."""
    sizes: list[int] = []
    fill = InitialLoad._fill

    def record(self: InitialLoad, wanted: Mapping[str, torch.Tensor]) -> None:
        matrices = [t for n, t in wanted.items() if n.startswith("layers.") and t.dim() == 2]
        sizes.append(sum(tensor.numel() for tensor in matrices))
        fill(self, wanted)

    with (
        patch.object(InitialLoad, "_fill", record),
        patch.object(initial_load, "_LOADED_AT_ONCE", 2 * 128 * 128),
    ):
        case = ONE if world.world_size == 1 else case_of(MESHES["PP 2"], dora=True)
        return train(world, case, folder, base, 1), sizes


def test_a_few_matrices_are_in_memory_at_a_time(
    gloo_pool: GlooPool, base: Path, alone: Leg, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        results = gloo_pool.run(ranks, load_few, str(tmp_path / str(ranks)), str(base))
        assert quantised(whole([leg for leg, _ in results], "loaded")) == quantised(alone.content)
        for _, sizes in results:
            assert max(sizes) <= 2 * 128 * 128 and len(sizes) > 8


@pytest.fixture(scope="module", params=[4, 8])
def adapted(
    request: pytest.FixtureRequest,
    gloo_pool: GlooPool,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AdaptedModel:
    case = case_of(float32=True, bits=request.param, targets=["w[qkv12]"])
    folder = tmp_path_factory.mktemp("run")
    [leg] = on(gloo_pool, case, folder, base, 3)
    assert not leg.error
    return open_adapted(folder / "step-3")


def test_a_merge_is_into_the_dequantised_matrix(adapted: AdaptedModel, tmp_path: Path) -> None:
    merged = replace(adapted.merged(None), tokenizer_path=None)
    text = write_model(merged, Target(tmp_path / "merged"))
    assert "reads back with a KL divergence of" in text and "in transformers" in text
    bits = adapted.handler.handler.settings.bits
    names = ["layers.0.attention.wq", "layers.0.attention.wo"]
    own = dict(read_tensors(adapted.base.weights, [f"{name}.weight" for name in names]))
    found = dict(read_tensors(merged.weights, list(own)))
    assert torch.equal(found[f"{names[1]}.weight"], own[f"{names[1]}.weight"])  # not a target
    weight = own[f"{names[0]}.weight"].float()
    rounded = dequantize(*quantize(weight, bits, torch.float32), bits, torch.float32)
    keys = [f"{names[0]}.lora_{part}" for part in "ab"]
    a, b = (tensor for _, tensor in read_tensors(adapted.model.weights, keys))
    torch.testing.assert_close(found[f"{names[0]}.weight"].float(), rounded + 2 * b @ a)
    assert not torch.allclose(rounded, weight, rtol=1e-4)


def test_an_adapter_in_peft(adapted: AdaptedModel, tmp_path: Path) -> None:
    """peft has it on the base as it is, so it computes what `lora` would."""
    pytest.importorskip("peft")
    assert ", in peft " in write_adapter(adapted, Target(tmp_path / "adapter"))
    tokens = probe(adapted.base.args)
    trained = adapted.logits(tokens)
    with adapted.handler.handler.on_plain_base():
        plain = adapted.logits(tokens)
    assert divergence(trained, plain) > 1e-5
    assert torch.equal(adapted.logits(tokens), trained)
