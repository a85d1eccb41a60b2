"""The handler `lora`: what it adapts and freezes, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import convert_model
from torchtitan.handlers.lora import LoraHandler, LoraLinear
from torchtitan.handlers.named import NamedHandler
from torchtitan.handlers.settings import LoraSettings
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import initialize_tensors
from torchtitan.preflight import ARITHMETIC, MODEL, preflight
from torchtitan.utils.dtypes import default_dtype

MATRICES = {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}
MATRICES |= {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}


def config_of(sections: dict[str, Any] | None = None, **settings: Any) -> JobConfig:
    args = {"n_layers": 2, "vocab_size": 64, "dim": 32, "n_heads": 4, "ffn_dim": 48}
    return JobConfig.model_validate(
        {
            "model": {"handlers": ["lora"], "args": args},
            "handlers": {"lora": settings},
            "training": {"mixed_precision_param": "float32"},
            **(sections or {}),
        }
    )


def adapted(config: JobConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The converted model, in memory, with its first values."""
    family = get_family("llama3")
    with torch.device("meta"), default_dtype(dtype):
        model = family.build(family.resolve(config.model))
    handler = NamedHandler("lora", config, ParallelDims())
    rules = convert_model(model, [handler], dtype)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    initialize_tensors(model.named_parameters(), rules, seed=0)
    handler.initialize_added(model)
    return model


def targets(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def test_all_linears_in_blocks_and_nothing_else_is_trained() -> None:
    model = adapted(config_of())
    assert targets(model) == {f"layers.{n}.{name}" for n in range(2) for name in MATRICES}
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in targets(model) for part in "ab"}


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["w[qv]"], {f"layers.{n}.attention.{name}" for n in range(2) for name in ("wq", "wv")}),
        (
            ["layers.1.*.w2", "*.0.attention.wo"],
            {"layers.1.feed_forward.w2", "layers.0.attention.wo"},
        ),
    ],
)
def test_targets(globs: list[str], expected: set[str]) -> None:
    assert targets(adapted(config_of(targets=globs))) == expected


def test_the_start() -> None:
    """A as torch starts linears, B at zero; the same bits for a matrix of the same name."""
    model = adapted(config_of(dora=True))
    linear = model.layers["0"].feed_forward.w2
    assert linear.lora_a.std().item() == pytest.approx((3 * 48) ** -0.5, rel=0.1)
    assert not linear.lora_b.any()
    torch.testing.assert_close(linear.magnitude, linear.weight.norm(dim=1))
    few = adapted(config_of(targets=["w2"])).layers["0"].feed_forward.w2
    assert torch.equal(few.lora_a, linear.lora_a)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product(rslora: bool, dora: bool, bias: bool) -> None:
    model = adapted(config_of(rank=4, alpha=12, rslora=rslora, dora=dora), torch.float64)
    linear = model.layers["0"].attention.wo.double()
    nn.init.normal_(linear.lora_b)
    linear.bias = nn.Parameter(torch.randn(32, dtype=torch.float64)) if bias else None
    matrix = linear.weight + (12 / math.sqrt(4) if rslora else 3) * linear.lora_b @ linear.lora_a
    if dora:
        matrix = matrix * (linear.magnitude / matrix.norm(dim=1)).unsqueeze(1)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(linear(x), F.linear(x, matrix, linear.bias))


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    model = adapted(config_of(dropout=0.25))
    linear = model.layers["0"].attention.wq
    nn.init.normal_(linear.lora_b)
    linear.dropout.name_channels(0, "wq", 0, torch.device("cpu"))
    x = torch.ones(1, 1, 32).expand(1, 20000, 32)
    linear.dropout.rows = torch.randint(-(2**31), 2**31, (1, 20000), dtype=torch.int32)
    with torch.no_grad():
        dropped, kept = linear(x).mean(1), linear.eval()(x).mean(1)
    torch.testing.assert_close(dropped, kept, rtol=0.05, atol=0.05)
    assert not torch.equal(dropped, kept)
    linear.train().dropout.p = 1 - 1e-12
    assert linear.dropout(x).count_nonzero() < 10


@pytest.mark.parametrize(
    ("training", "settings", "expected"),
    [
        ({}, {}, torch.bfloat16),
        ({"mixed_precision_param": "float32"}, {}, torch.float32),
        ({"dtype": "bfloat16", "mixed_precision_param": "float32"}, {}, torch.bfloat16),
        ({}, {"base_dtype": "float32"}, torch.float32),
    ],
)
def test_the_type_of_the_base(
    training: dict[str, str], settings: dict[str, str], expected: torch.dtype
) -> None:
    config = config_of({"training": training}, **settings)
    own = torch.bfloat16 if training.get("dtype") else torch.float32
    model = adapted(config, own)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, own), (False, expected)}


def test_floating_point_operations() -> None:
    """Frozen matrices need no gradient of their own."""
    model = adapted(config_of(rank=2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    frozen -= model.tok_embeddings.weight.numel()
    attention = model.flops_per_token(8, False) - 6 * trained - 4 * frozen
    assert attention == 12 * 2 * 32 * 8


def issues_of(config: JobConfig) -> list[str]:
    return [str(issue) for issue in preflight(RunContext(config, 1, "cpu"), [ARITHMETIC, MODEL])]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "handlers.lora.rank = 0: "),
        ({"rank": -1}, "handlers.lora.rank = -1: "),
        ({"alpha": 0}, "handlers.lora.alpha = 0: "),
        ({"dropout": 1}, "handlers.lora.dropout = 1: "),
        ({"dropout": -0.1}, "handlers.lora.dropout = -0.1: "),
        ({"rank": 33}, "handlers.lora.rank = 33: is more than the matrix layers.0.attention.wq"),
        ({"targets": ["wq", "*.w4"]}, 'handlers.lora.targets[1] = "*.w4": it matches no linear'),
        ({"targets": ["output"]}, 'handlers.lora.targets[0] = "output": it matches no linear'),
        ({"base_dtype": "int8"}, "handlers.lora.base_dtype"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    found = issues_of(config_of(**settings))
    assert any(words in text and "Fix: " in text for text in found), found


def test_the_adapters_path_is_expanded() -> None:
    assert LoraSettings(adapter="~/adapter").adapter == str(Path.home() / "adapter")


def test_a_wrong_glob_gets_the_nearest_name() -> None:
    config = config_of(targets=["layers.0.attention.wp"])
    assert any('did you mean "layers.0.attention.w' in text for text in issues_of(config))


def test_low_precision_is_refused() -> None:
    config = config_of({"model": {"handlers": ["lora", "int8"]}})
    assert any("cannot be combined with int8" in text for text in issues_of(config))


def test_an_export_at_the_end_names_the_merge() -> None:
    found = issues_of(config_of({"checkpoint": {"enable": True, "last_save_in_hf": True}}))
    assert any("`torchtitan export STEP OUT --merge`" in text for text in found), found


def test_frozen_parts_of_adapters_pass_the_checks_before_the_start() -> None:
    """`freeze` is asked about the model that has them; a glob that matches none is still found."""
    handlers = {"handlers": ["lora", "freeze"], "args": config_of().model.args}
    for glob, found in (("*.lora_a", 0), ("*.lora_c", 1)):
        tables = {"lora": {}, "freeze": {"patterns": [glob]}}
        config = config_of({"model": handlers, "handlers": tables})
        assert len(preflight(RunContext(config, 1, "cpu"), [MODEL])) == found


def test_nothing_left_to_train() -> None:
    handlers = {"freeze": {"patterns": ["*.lora_?"]}, "lora": {}}
    model = {"handlers": ["lora", "freeze"], "args": config_of().model.args}
    found = issues_of(config_of({"model": model, "handlers": handlers}))
    assert any("leave no parameter to train" in text for text in found), found


def test_the_class_names_its_base() -> None:
    assert LoraHandler.adds_adapters
