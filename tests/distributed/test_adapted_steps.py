"""Steps with adapters as commands open them: whole ones, and such whose base has moved."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.adapted_runs import on, write_base
from tests.distributed.test_adapter_exports import case_of as lora_case
from tests.distributed.test_qlora_checkpoints import LARGE, MESHES, case_of, quantised, whole
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.pool import GlooPool
from torchtitan.checkpoint.base_place import NOT_MOVED, MovedBase
from torchtitan.checkpoint.manifest import MANIFEST_NAME, base_of, read_manifest
from torchtitan.config import CheckpointError, ConfigError, JobConfig
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.registry import get_family
from torchtitan.training.adapters import open_adapted
from torchtitan.training.export import Target, write_adapter, write_model
from torchtitan.training.open_model import open_model
from torchtitan.training.pretrained import Pretrained, load_pretrained
from torchtitan.weights.readback import divergence, probe
from torchtitan.weights.stored_model import read_tensors

QLORA = case_of(float32=True, dora=True)
KINDS: Mapping[str, Case] = {
    "lora": lora_case("lora"),
    "dora": lora_case("dora"),
    "qlora": QLORA,
    "qlora of 8 bits": case_of(float32=True, bits=8),
}


def logits_on(
    world: DistributedContext, path: str, shards: int, moved: MovedBase = NOT_MOVED
) -> torch.Tensor:
    """Logits by a step as `generate`, `chat` and `evaluate` open it."""
    config = JobConfig.model_validate(read_manifest(Path(path)).info["config"])
    family, dims = get_family(config.model.name), ParallelDims(dp_shard=shards)
    args = family.resolve(config.model, VOCAB_SIZE)
    tokenizer: Any = None
    found = Pretrained(Path(path), family, args, tokenizer, (), config, moved=moved)
    model: Any = load_pretrained(found, world, dims.build_mesh("cpu"), dims, torch.float32)
    tokens = probe(args)  # type: ignore[arg-type]
    with torch.no_grad():
        hidden = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
        return model.head(hidden).clone()


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "qlora",
        pytest.param("dora", marks=pytest.mark.nightly),
        pytest.param("qlora of 8 bits", marks=pytest.mark.nightly),
    ],
)
def test_a_step_without_a_base_is_merged(gloo_pool: GlooPool, tmp_path: Path, kind: str) -> None:
    """It began with random weights, which it holds itself, quantised or not."""
    case, step = KINDS[kind], tmp_path / "run" / "step-3"
    [first] = on(gloo_pool, case, tmp_path / "run", None, 3)
    assert not first.error and base_of(read_manifest(step)) is None
    adapted = open_adapted(step)
    expected = adapted.logits(probe(adapted.base.args))
    [found] = gloo_pool.run(1, logits_on, str(step), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tensors = adapted.model.weights.tensors
    off = {name: torch.tensor(float("magnitude" in name)) for name in tensors}
    assert divergence(expected, adapted.logits(probe(adapted.base.args), off)) > 1e-6
    merged = replace(adapted.merged(None), tokenizer_path=None)
    assert "in transformers" in write_model(merged, Target(tmp_path / "merged"))
    with pytest.raises(ConfigError, match="its adapters are of no use alone"):
        write_adapter(adapted, Target(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"holds adapters apart from their base.* --merge"):
        open_model(step)


def test_a_whole_quantised_step_is_a_start(gloo_pool: GlooPool, tmp_path: Path) -> None:
    [first] = on(gloo_pool, case_of(dora=True), tmp_path / "run", None, 2)
    expected = {n: d for n, d in first.content.items() if not n.startswith("optimizer.")}
    case, step = case_of(MESHES["TP 2"], dora=True), tmp_path / "run" / "step-2"
    found = whole(on(gloo_pool, case, tmp_path / "two", step, 1), "loaded")
    assert {n: d for n, d in found.items() if not n.startswith("optimizer.")} == expected
    adapted = open_adapted(tmp_path / "two" / "step-1")
    assert adapted.base.path == step
    merged = adapted.merged(None).weights
    plain = open_adapted(step).merged(None).weights
    assert merged.tensors.keys() == plain.tensors.keys(), "without adapters and codes"
    name = "layers.0.attention.wq.weight"
    pairs = [dict(read_tensors(weights, [name])) for weights in (merged, plain)]
    assert not torch.equal(*(pair[name] for pair in pairs)), "a step later"
    torch.testing.assert_close(*(pair[name] for pair in pairs), rtol=0, atol=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the model."""
    return write_base(tmp_path_factory.mktemp("base") / "hf", QLORA)


def test_a_base_of_dcp_without_a_manifest(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> None:
    """As another program saves it: quantised to the same bytes, known by its content."""
    [leg] = on(gloo_pool, Case(shard=1, args=LARGE), tmp_path / "plain", base, 1)
    assert not leg.error
    step, bare = tmp_path / "plain" / "step-1", tmp_path / "bare"
    shutil.copytree(step, bare)
    (bare / MANIFEST_NAME).unlink()
    found = []
    for name, place in (("one", step), ("two", bare)):
        legs = on(gloo_pool, case_of(MESHES["TP 2"]), tmp_path / name, place, 1)
        found.append(quantised(whole(legs, "loaded")))
    assert found[0] == found[1]
    [again] = on(gloo_pool, case_of(), tmp_path / "two", bare, 2)
    assert quantised(whole([again], "loaded")) == found[0]
    adapted = open_adapted(tmp_path / "two" / "step-2")
    assert adapted.base.path == bare
    assert adapted.logits(probe(adapted.base.args)).isfinite().all()
    [file] = [f for f in bare.iterdir() if f.suffix == ".distcp"]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its content differs. Fix: restore it$"):
        open_adapted(tmp_path / "two" / "step-2")


def test_a_base_that_was_moved(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> None:
    """Exports, and what generates and evaluates, take its new place; the content decides."""
    first, second = tmp_path / "hf", tmp_path / "elsewhere"
    shutil.copytree(base, first)
    on(gloo_pool, QLORA, tmp_path / "run", first, 3)
    step = tmp_path / "run" / "step-3"
    adapted = open_adapted(step)
    expected = adapted.logits(probe(adapted.base.args))
    first.rename(second)
    moved = MovedBase("--base", str(second))
    for ranks in (1, 2):
        for found in gloo_pool.run(ranks, logits_on, str(step), ranks, moved):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    adapted = open_adapted(step, moved=moved)
    assert torch.equal(adapted.logits(probe(adapted.base.args)), expected)
    with pytest.raises(CheckpointError, match="Fix: restore it, or set --base to where it is now"):
        open_adapted(step, moved=MovedBase("--base"))
    other = write_base(tmp_path / "other", lora_case("lora"))
    with pytest.raises(CheckpointError, match=f"other .it was {first}. is not the one"):
        open_adapted(step, moved=MovedBase("--base", str(other)))
