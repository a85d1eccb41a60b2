"""Every family of the registry: published sizes, and declarations that agree with the modules."""

import math
import re

import pytest
import torch
from torch import nn

from tests.families import FAMILIES, built_in
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import require_language_model
from torchtitan.models.hf_weights import hf_names
from torchtitan.models.registry import get_family
from torchtitan.models.spec import LanguageModel, ModelArgs
from torchtitan.parallel.tensor_parallel import TensorStyles

FLAVORS = [(name, flavor) for name in built_in() for flavor in get_family(name).flavors]
PUBLISHED = [(name, flavor) for name in FAMILIES for flavor in FAMILIES[name].parameters]
VOCAB_SIZE = 131


def args_of(name: str, flavor: str, **overrides) -> ModelArgs:
    args = get_family(name).resolve_args(flavor, overrides, None)
    return args if args.vocab_size else args.model_copy(update={"vocab_size": VOCAB_SIZE})


def on_meta(name: str, args: ModelArgs) -> nn.Module:
    with torch.device("meta"):
        return get_family(name).build(args)


def small(name: str, **overrides) -> tuple[ModelArgs, nn.Module]:
    args = args_of(name, "debugmodel", n_layers=2, **overrides)
    return args, on_meta(name, args)


def test_every_family_has_a_row():
    assert list(FAMILIES) == built_in()
    unpublished = [pair for pair in FLAVORS if pair not in PUBLISHED]
    assert unpublished == [(name, "debugmodel") for name in built_in()]


@pytest.mark.parametrize(("name", "flavor"), FLAVORS)
def test_sizes(name, flavor):
    """The modules on the meta device, against what is published and what is declared."""
    args = args_of(name, flavor)
    model = on_meta(name, args)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == FAMILIES[name].parameters.get(flavor, number)
    assert list(model.buffers()) == []
    declared = {
        top: sum(parameter.numel() for parameter in model.get_submodule(top).parameters())
        for top in args.modules()
    }
    assert declared == args.modules()
    assert {
        name.partition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)
    } == {top.partition(".")[0] for top in args.modules()}


@pytest.mark.parametrize(("name", "flavor"), PUBLISHED)
def test_published_hyper_parameters(name, flavor):
    args, row = args_of(name, flavor), FAMILIES[name]
    published = {**row.common, **row.exceptions.get(flavor, {})}
    assert {key: getattr(args, key) for key in published} == published
    assert args.head_size() == row.head_sizes[flavor]


@pytest.mark.parametrize("name", built_in())
def test_shapes_that_are_declared(name):
    args, model = small(name)
    heads, head = args.heads(), args.head_size()
    with torch.device("meta"):
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        hidden = model(tokens, torch.arange(8).expand(2, -1))
    assert hidden.shape == (2, 8, args.hidden_size())
    assert model.head(hidden).shape == (2, 8, args.vocab_size)
    for block in model.blocks().values():
        widths = [getattr(block.attention, name).out_features for name in ("wq", "wk", "wv")]
        assert widths == [head * heads[0], head * heads[1], head * heads[1]]


@pytest.mark.parametrize("name", built_in())
@pytest.mark.parametrize("tied", [False, True])
def test_declarations_cover_every_parameter(name, tied):
    args, model = small(name, tied_embeddings=tied)
    require_language_model(model, name)
    assert isinstance(model, LanguageModel)
    names = [parameter for parameter, _ in model.named_parameters()]
    plan = model.tensor_parallel_plan(TensorStyles(2))
    assert {parameter.rpartition(".")[0] for parameter in names} <= plan.keys()
    assert all(model.get_submodule(module) is not None for module in plan)
    starts = {parameter: model.init_rule(parameter) for parameter in names}
    assert {kind for kind in starts if starts[kind].kind == "constant"} == {
        kind for kind in names if kind.endswith(("norm.weight", ".bias"))
    }
    table = get_family(name).hf_weights
    assert list(hf_names(names, table, args)) == names
    units = [
        p for unit in model.wrap_units() for module in unit.modules for p in module.parameters()
    ]
    assert len(units) == len({id(parameter) for parameter in units})
    ends = {"norm.weight", "tok_embeddings.weight"} if tied else {"norm.weight"}
    wrapped = {id(parameter) for parameter in units}
    assert {name for name, p in model.named_parameters() if id(p) not in wrapped} == ends


@pytest.mark.parametrize("name", built_in())
@pytest.mark.parametrize("tied", [False, True])
def test_flops_follow_the_matrices(name, tied):
    """6 for each weight that a token is multiplied with, 12 for each channel of an attended key."""
    _, model = small(name, tied_embeddings=tied)
    weights = sum(parameter.numel() for parameter in model.parameters())
    weights -= 0 if tied else model.tok_embeddings.weight.numel()
    channels = sum(block.attention.wo.in_features for block in model.blocks().values())
    assert model.flops_per_token(100, causal=False) == 6 * weights + 12 * channels * 100
    assert model.flops_per_token(100, causal=True) == 6 * weights + 12 * channels * 50


@pytest.mark.parametrize("name", built_in())
def test_kept_modules_are_those_that_are_named(name):
    args, model = small(name)
    first, *_, last = args.modules()
    model.keep_modules([first, "layers.1"])
    left = {re.sub(r"(layers\.\d+|^\w+)\..*", r"\1", p) for p, _ in model.named_parameters()}
    assert left == {first, "layers.1"} and last not in left


@pytest.mark.parametrize("name", built_in())
def test_a_vocabulary_is_needed(name):
    with pytest.raises(ValueError, match="vocab_size is unset"):
        on_meta(name, get_family(name).flavors["debugmodel"])


def test_biases_are_declared():
    args = DecoderArgs(
        vocab_size=50,
        dim=32,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=10,
        ffn_dim=48,
        qkv_bias=True,
    )
    model = on_meta("qwen3", args)
    biases = {name: p.numel() for name, p in model.named_parameters() if name.endswith("bias")}
    assert biases == {f"layers.0.attention.w{x}.bias": n for x, n in zip("qkv", (40, 20, 20))}
    assert all(model.init_rule(name).value == 0.0 for name in biases)
    assert sum(args.modules().values()) == sum(p.numel() for p in model.parameters())
    assert math.isclose(args.modules()["layers.0"], 32 * 10 * 12 + 80 + 3 * 32 * 48 + 64)
