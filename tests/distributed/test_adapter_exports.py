"""Adapters in PEFT's format and merged: what other programs compute with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.adapted_runs import on, write_base
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.pool import GlooPool
from torchtitan.checkpoint import dcp_io
from torchtitan.checkpoint.manifest import MANIFEST_NAME, read_manifest, write_manifest
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.peft import CONFIG_NAME, WEIGHTS_NAME, read_peft
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.preflight import MODEL, preflight
from torchtitan.training.adapters import AdaptedModel, open_adapted
from torchtitan.training.export import Target, write_adapter, write_model
from torchtitan.training.open_model import open_model
from torchtitan.weights.readback import divergence, logits_of_peft, probe
from torchtitan.weights.stored_model import StoredModel, read_tensors

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["w[qk]", "w2"]},
    "dora": {"rank": 3, "alpha": 6.0, "dora": True, "rslora": True, "dropout": 0.1},
}


def case_of(kind: str, float32: bool = True, **more: Any) -> Case:
    settings: dict[str, dict[str, Any]] = {"model": {"handlers": ["lora"]}}
    settings["handlers"] = {"lora": {**KINDS[kind], **more}}
    settings["optimizer"] = {"lr": 0.1}
    if float32:
        kinds = ("dtype", "mixed_precision_param", "mixed_precision_reduce")
        settings["training"] = dict.fromkeys(kinds, "float32")
    return Case(shard=1, settings=settings)


@pytest.fixture(scope="module", params=KINDS)
def step(
    request: pytest.FixtureRequest, gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A kind of adapters, and a step in which they are far from where they started."""
    folder = tmp_path_factory.mktemp(request.param)
    case = case_of(request.param)
    [leg] = on(gloo_pool, case, folder / "run", write_base(folder / "hf", case), 3)
    assert not leg.error
    return request.param, folder / "run" / "step-3"


def merged_of(adapted: AdaptedModel, dtype: str | None = None) -> StoredModel:
    """The merged model, without the run's tokenizer, which has more tokens."""
    return replace(adapted.merged(dtype), tokenizer_path=None)


def test_an_adapter_in_peft(step: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kind, path = step
    adapted = open_adapted(path)
    text = write_adapter(adapted, Target(tmp_path / "adapter"))
    assert ", in peft " in text
    tokens = probe(adapted.base.args)
    expected = adapted.logits(tokens)
    found = logits_of_peft(adapted.base.path, tmp_path / "adapter", tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    zeros = {name: torch.zeros(()) for name in adapted.model.weights.tensors}
    if kind == "lora":  # rows of length 0 have no direction
        assert divergence(expected, adapted.logits(tokens, zeros)) > 1e-3
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "who may read the config may read the weights"
    names = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())["target_modules"]
    assert ("q_proj" in names) and ("v_proj" in names) == (kind == "dora")


def test_a_merged_model(step: tuple[str, Path], tmp_path: Path) -> None:
    """transformers computes what the adapter does on its base."""
    adapted = open_adapted(step[1])
    text = write_model(merged_of(adapted), Target(tmp_path / "merged"))
    assert "reads back with a KL divergence of" in text and "in transformers" in text
    merged = open_model(tmp_path / "merged")
    assert merged.weights.tensors.keys() == adapted.base.weights.tensors.keys()
    with pytest.raises(ConfigError, match="holds no adapters: it is a whole model, or one that is"):
        open_adapted(tmp_path / "merged")


def test_a_merge_in_few_bits_is_compared_with_their_rounding(
    step: tuple[str, Path], tmp_path: Path
) -> None:
    target = Target(tmp_path / "merged", dtype="bfloat16")
    assert "bound 1e-01" in write_model(merged_of(open_adapted(step[1]), "bfloat16"), target)


def test_a_merge_in_float64_is_as_exact(
    step: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters keep their own type over any base."""
    adapted = open_adapted(step[1])
    types: set[torch.dtype] = set()
    merge = adapted.handler.handler.merge_added

    def record(name: str, weight: torch.Tensor, added: Any) -> torch.Tensor:
        types.update(tensor.dtype for tensor in (weight, *added.values()))
        return merge(name, weight, added)

    monkeypatch.setattr(adapted.handler.handler, "merge_added", record)
    for given, wide in (("float64", torch.float64), ("bfloat16", torch.float32)):
        weights = adapted.merged(given).weights
        dict(read_tensors(weights, weights.tensors))
        assert types == {wide}
        types.clear()


def test_a_merge_reads_the_description_of_its_step_once(
    step: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a matrix it was most of the time of a merge."""
    weights = open_adapted(step[1]).merged(None).weights
    read, calls = dcp_io.read_metadata, []

    def count(*args: Any) -> Any:
        calls.append(args)
        return read(*args)

    monkeypatch.setattr(dcp_io, "read_metadata", count)
    assert len(dict(read_tensors(weights, weights.tensors))) > 10
    assert len(calls) == 1


def test_a_handler_that_computes_the_same_may_be_there(
    step: tuple[str, Path], tmp_path: Path
) -> None:
    """Its window is the model's."""
    copy = tmp_path / "step-3"
    shutil.copytree(step[1], copy)
    manifest = read_manifest(copy)
    config = manifest.info["config"]
    config["model"]["handlers"] += ["flex_attention"]
    config["handlers"]["flex_attention"] = {"window": 5}
    (copy / MANIFEST_NAME).unlink()
    write_manifest(copy, manifest)
    adapted = open_adapted(copy)
    assert adapted.handler.name == "lora" and adapted.base.args.sliding_window == 5


def test_a_wrong_merge_is_not_written(
    step: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = open_adapted(step[1])
    monkeypatch.setattr(adapted.handler.handler, "merge_added", lambda name, weight, added: weight)
    merged = merged_of(adapted)
    with pytest.raises(CheckpointError, match="the export computes something else"):
        write_model(merged, Target(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_plain_export_says_what_to_do(step: tuple[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"holds adapters apart from their base.* --merge"):
        open_model(step[1])


@pytest.mark.parametrize("mesh", [{}, {"shard": 2, "tp": 2, "world_size": 4}])
def test_a_run_starts_from_pefts_adapter(
    mesh: dict[str, int], step: tuple[str, Path], gloo_pool: GlooPool, tmp_path: Path
) -> None:
    """It goes on with the same weights, from a step that counts from 0 again."""
    kind, path = step
    adapted = open_adapted(path)
    write_adapter(adapted, Target(tmp_path / "adapter"))
    case = case_of(kind, adapter=str(tmp_path / "adapter"))
    case = Case(**{**vars(case), **mesh})
    legs = on(gloo_pool, case, tmp_path / "new", adapted.base.path, 1)
    again = on(gloo_pool, case_of(kind), tmp_path / "other", path, 1)
    loaded = {name: d for leg in legs for name, d in leg.loaded.items()}
    expected = {n: d for n, d in again[0].loaded.items() if not n.startswith("optimizer.")}
    assert {name: loaded[name] for name in expected} == expected
    assert legs[0].losses == pytest.approx(again[0].losses, rel=1e-5)
    shutil.rmtree(tmp_path / "adapter")  # the run's own checkpoints do without it
    trained = open_adapted(tmp_path / "new" / "step-1")
    assert trained.logits(probe(trained.base.args)).isfinite().all()


def issues_of(kind: str, **settings: Any) -> list[str]:
    config = case_of(kind, **settings).config()
    args = {**config.model.args, "vocab_size": VOCAB_SIZE}
    config = config.model_copy(update={"model": config.model.model_copy(update={"args": args})})
    return [str(issue) for issue in preflight(RunContext(config, 1, "cpu"), [MODEL])]


def test_an_adapter_that_does_not_fit(step: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = step
    adapter = tmp_path / "adapter"
    write_adapter(open_adapted(path), Target(adapter))
    assert issues_of(kind, adapter=str(adapter)) == []
    for settings, words in (
        ({"rank": 2}, "handlers.lora.rank = 2: is "),
        ({"alpha": 1.0}, "handlers.lora.alpha = 1.0: is "),
        ({"targets": ["w3"]}, "handlers.lora.targets = ['w3']: layers.0."),
    ):
        (found,) = issues_of(kind, adapter=str(adapter), **settings)
        assert found.startswith(words.replace("'", '"')), found
    (found,) = issues_of(kind, adapter=str(tmp_path / "nothing"))
    assert "handlers.lora.adapter = " in found and "cannot be read" in found
    config = json.loads((adapter / CONFIG_NAME).read_text())
    for key, value, words in (
        ("bias", "all", "bias = 'all' is not supported"),
        ("layer_replication", [[0, 1]], "layer_replication = [[0, 1]] is not supported"),
        ("init_lora_weights", "pissa_niter_4", "changes the base's weights"),
    ):
        (adapter / CONFIG_NAME).write_text(json.dumps({**config, key: value}))
        (found,) = issues_of(kind, adapter=str(adapter))
        assert words in found


def test_names_of_pefts_adapter(step: tuple[str, Path], tmp_path: Path) -> None:
    """Rows of B that RoPE turns are reordered, and those of A are not."""
    adapted = open_adapted(step[1])
    write_adapter(adapted, Target(tmp_path / "adapter"))
    args = get_family("llama3").resolve(case_of(step[0]).config().model, VOCAB_SIZE)
    assert isinstance(args, DecoderArgs)
    found = read_peft(tmp_path / "adapter", get_family("llama3"), args)
    assert found.keys() == adapted.model.weights.tensors.keys()
    assert (tmp_path / "adapter" / WEIGHTS_NAME).exists()
