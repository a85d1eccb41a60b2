"""The handler `qlora`: its format, what it holds and computes, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import convert_model
from torchtitan.handlers.named import NamedHandler
from torchtitan.handlers.qlora import QloraLinear
from torchtitan.handlers.quantised import BLOCK, NF4, dequantize, quantize
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import initialize_tensors
from torchtitan.preflight import ARITHMETIC, MODEL, preflight
from torchtitan.utils.dtypes import default_dtype


def config_of(
    sections: dict[str, Any] | None = None, dim: int = 128, handler: str = "qlora", **settings: Any
) -> JobConfig:
    args = {"n_layers": 2, "vocab_size": 64, "dim": dim, "n_heads": 4, "ffn_dim": 192}
    return JobConfig.model_validate(
        {
            "model": {"handlers": [handler], "args": args},
            "handlers": {handler: settings},
            "training": {"mixed_precision_param": "float32"},
            **(sections or {}),
        }
    )


def adapted(config: JobConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The converted model, in memory, with its first values."""
    family = get_family("llama3")
    with torch.device("meta"), default_dtype(dtype):
        model = family.build(family.resolve(config.model))
    handler = NamedHandler(config.model.handlers[0], config, ParallelDims())
    rules = convert_model(model, [handler], dtype)  # type: ignore[arg-type]
    model.flops = model.flops_per_token(8, False)  # type: ignore[attr-defined, operator]
    model.to_empty(device="cpu")
    initialize_tensors(model.named_parameters(), rules, seed=0)
    handler.initialize_added(model)
    return model


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.0920), (8, 0.0059)])
def test_the_error_of_normal_values(bits: int, expected: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    codes, scale = quantize(weight, bits, torch.float32)
    error = dequantize(codes, scale, bits, torch.float32) - weight
    assert (error.norm() / weight.norm()).item() == pytest.approx(expected, rel=0.02)
    stored = codes.nbytes + quantize(weight, bits, torch.bfloat16)[1].nbytes
    assert 8 * stored / weight.numel() == bits + 16 / BLOCK


def test_levels_come_back_and_the_nearest_is_chosen() -> None:
    levels = torch.tensor(NF4)
    row = levels.repeat(4).unsqueeze(0) * 3
    assert torch.equal(dequantize(*quantize(row, 4, torch.float32), 4, torch.float32), row)
    values = torch.rand(8, BLOCK) * 2 - 1
    values[:, 0] = 1
    nearest = levels[(values.unsqueeze(2) - levels).abs().argmin(2)]
    assert torch.equal(dequantize(*quantize(values, 4, torch.float32), 4, torch.float32), nearest)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_quantise_to_the_bytes_of_the_whole(bits: int) -> None:
    weight = torch.randn(7, 4 * BLOCK)
    weight[2] = 0
    whole = quantize(weight, bits, torch.bfloat16)
    assert not dequantize(*whole, bits, torch.float32)[2].any()
    for dim, where in ((0, [3, 4]), (1, [BLOCK, 3 * BLOCK])):
        parts = [quantize(part, bits, torch.bfloat16) for part in weight.split(where, dim)]
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts], dim), whole[index])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_is_rounded_once(bits: int) -> None:
    held = quantize(torch.randn(64, 4 * BLOCK), bits, torch.bfloat16)
    exact = dequantize(*held, bits, torch.float32)
    assert torch.equal(dequantize(*held, bits, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernels_of_bitsandbytes_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted(config_of(dora=True)).to(dtype)
    linear = model.layers["0"].feed_forward.w2
    nn.init.normal_(linear.lora_b)
    x = torch.randn(2, 3, 192, dtype=dtype)
    calls, found = [], []
    run = torch.ops.bitsandbytes.dequantize_4bit.default

    def record(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(torch.ops.bitsandbytes.dequantize_4bit, "default", record)
    for with_kernels in (False, True):
        if with_kernels:
            NamedHandler("qlora", config_of(), ParallelDims()).after_load(model)
        of_input = x.clone().requires_grad_()
        out = linear(of_input)
        out.square().sum().backward()
        found.append([out, of_input.grad, linear.lora_a.grad.clone()])
        linear.zero_grad()
        assert bool(calls) == (with_kernels and dtype != torch.float64)
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def dequantized(linear: QloraLinear) -> Tensor:
    return linear.frozen_matrix().detach()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_lora_over_the_dequantised_base(bits: int, dora: bool, bias: bool) -> None:
    """Output and gradients."""
    settings = {"rank": 4, "alpha": 12, "dora": dora}
    ours = adapted(config_of(bits=bits, **settings), torch.float64).double()
    theirs = adapted(config_of(handler="lora", **settings), torch.float64).double()
    ours, theirs = (model.layers["0"].feed_forward.w2 for model in (ours, theirs))
    assert not torch.equal(theirs.weight, dequantized(ours))
    theirs.weight.data = dequantized(ours)
    values = dict(ours.named_parameters())
    nn.init.normal_(ours.lora_b)
    found = []
    for name, parameter in theirs.named_parameters():
        if name != "weight":
            parameter.data.copy_(values[name])
    x = torch.randn(2, 3, 192, dtype=torch.float64)
    for linear in (ours, theirs):
        offset = torch.ones(128, dtype=torch.float64)
        linear.bias = nn.Parameter(offset, requires_grad=False) if bias else None
        of_input = x.clone().requires_grad_()
        out = linear(of_input)
        out.square().sum().backward()
        trained = [p.grad for p in linear.parameters() if p.requires_grad]
        found.append([out, of_input.grad, *trained])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)
    ours.adapted = False
    torch.testing.assert_close(ours(x), F.linear(x, theirs.weight, theirs.bias))


def test_no_wide_matrix_is_kept_for_the_backward() -> None:
    linear = adapted(config_of()).layers["0"].feed_forward.w1
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(1, 2, 128, requires_grad=True))
    assert all(tensor.numel() < 192 * 128 for tensor in kept)
    assert any(tensor.dtype == torch.uint8 for tensor in kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_held(bits: int) -> None:
    config = config_of({"training": {}}, bits=bits)
    model = adapted(config)
    held = dict(model.layers["0"].attention.wq.named_parameters())
    assert {name for name, p in held.items() if p.requires_grad} == {"lora_a", "lora_b"}
    assert held["weight_scale"].dtype == torch.bfloat16 and "weight" not in held
    frozen = [p for p in held.values() if not p.requires_grad]
    assert sum(p.nbytes for p in frozen) == 128 * 128 * (bits + 0.25) / 8


@pytest.mark.parametrize("bits", [4, 8])
def test_floating_point_operations(bits: int) -> None:
    """A quantised matrix is multiplied with as any other."""
    plain = adapted(config_of(handler="lora"))
    assert adapted(config_of(bits=bits)).flops == plain.flops


def issues_of(config: JobConfig, world: int = 1) -> list[str]:
    context = RunContext(config, world, "cpu")
    return [str(issue) for issue in preflight(context, [ARITHMETIC, MODEL])]


@pytest.mark.parametrize(
    ("dim", "tp", "settings", "words"),
    [
        (128, 1, {"bits": 3}, "handlers.qlora.bits = 3: is not a choice. Fix: set it to 4 or 8"),
        (96, 1, {}, "layers.0.attention.wq has 96 inputs, and blocks of 64 share a scale"),
        (128, 1, {"targets": ["w4"]}, 'handlers.qlora.targets[0] = "w4": it matches no linear'),
        (128, 4, {}, "would cut the 128 inputs of layers.0.attention.wo within blocks of 64"),
        (128, 2, {"targets": ["w2"]}, "would cut the 192 inputs of layers.0.feed_forward.w2"),
    ],
)
def test_bad_settings(dim: int, tp: int, settings: dict[str, Any], words: str) -> None:
    parallelism = {"parallelism": {"tensor_parallel_degree": tp}}
    found = issues_of(config_of(parallelism, dim=dim, **settings), tp)
    assert any(words in text and "Fix: " in text for text in found), found


def test_a_cut_between_blocks_is_fine() -> None:
    parallelism = {"parallelism": {"tensor_parallel_degree": 2}}
    found = issues_of(config_of(parallelism, targets=["w[qkvo]", "w[13]"]), 2)
    assert not any("qlora" in text or "tensor_parallel" in text for text in found), found


@pytest.mark.parametrize("other", ["lora", "int8"])
def test_other_handlers_are_refused(other: str) -> None:
    config = config_of({"model": {"handlers": ["qlora", other]}})
    assert any("cannot be combined with" in text for text in issues_of(config))
