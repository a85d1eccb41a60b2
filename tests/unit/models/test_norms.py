"""The kinds of norm: what they compute, what they hold, and what a model with them declares."""

from typing import get_args

import pytest
import torch

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.schema import Model, NormType, Optimizer
from torchtitan.models.family import ModelFamily
from torchtitan.models.llama3 import FAMILY
from torchtitan.models.norms import build_norm
from torchtitan.models.spec import ModelArgs
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.optim.registry import check_patterns
from torchtitan.parallel.initialize import initialize_parameters

KINDS = get_args(NormType)
WITH_WEIGHT = [kind for kind in KINDS if kind != "np_layernorm"]
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48}


def expected(kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if "layernorm" in kind:
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    return normed if kind == "np_layernorm" else normed * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) + 3).to(dtype)
    weight = torch.rand(16, generator=generator, dtype=torch.float64).to(dtype)
    norm = build_norm(kind, 16, eps=0.1).to(dtype)
    if kind in WITH_WEIGHT:
        norm.weight.data.copy_(weight)
    upstream = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    out = norm(x)
    out.backward(upstream.to(dtype))
    wide = x.detach().double().requires_grad_()
    reference = expected(kind, wide, weight)
    reference.backward(upstream.to(dtype).double())
    assert out.dtype == dtype
    for found, wanted in [(out, reference), (x.grad, wide.grad)]:
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance


def model_of(kind: NormType) -> torch.nn.Module:
    return FAMILY.build(FAMILY.resolve(Model(norm_type=kind, args=SMALL), vocab_size=50))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_holds_what_its_hyper_parameters_say(kind):
    model = model_of(kind)
    sizes = dict.fromkeys(model.args.modules(), 0)
    for name, parameter in model.named_parameters():
        top = ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
        sizes[top] += parameter.numel()
    assert sizes == model.args.modules()
    initialize_parameters(model, model.init_rule, seed=1)
    norms = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    assert len(norms) == (5 if kind in WITH_WEIGHT else 0)
    assert all(name.endswith("norm.weight") and (p == 1).all() for name, p in norms.items())


@pytest.mark.parametrize("kind", KINDS)
def test_norms_have_no_weight_decay(kind):
    model, section = model_of(kind), Optimizer()
    names = [name for name, _ in model.named_parameters()]
    assert check_patterns(section, names) == []
    (optimizer,) = build_optimizers(section, [model], torch.device("cpu"))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {p: 0.1 if p.dim() > 1 else 0.0 for p in model.parameters()}
    assert decays == wanted


def problem_of(family: ModelFamily, **model) -> str:
    with pytest.raises(ConfigError) as error:
        family.resolve(Model(**model))
    return str(error.value.problems[0])


def test_the_setting_reaches_the_model():
    assert model_of("layernorm").args.norm_type == "layernorm"
    by_args = Model(args={**SMALL, "norm_type": "layernorm"})
    assert FAMILY.resolve(by_args, 50) == model_of("layernorm").args
    agreeing = {"norm_type": "layernorm", "args": {"norm_type": "layernorm"}}
    assert FAMILY.resolve(Model(**agreeing)).norm_type == "layernorm"


def test_settings_that_contradict_each_other():
    problem = problem_of(FAMILY, norm_type="layernorm", args={"norm_type": "np_layernorm"})
    assert 'model.norm_type = "layernorm": model.args.norm_type says otherwise' in problem


def test_a_family_without_a_choice():
    mine = ModelFamily("mine", ModelArgs, {"debugmodel": ModelArgs()}, lambda args: None)
    assert mine.resolve(Model()) == ModelArgs()
    assert "the family mine has no choice of norms" in problem_of(mine, norm_type="layernorm")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="np_layernorm"):
        JobConfig.model_validate({"model": {"norm_type": "batchnorm"}})
