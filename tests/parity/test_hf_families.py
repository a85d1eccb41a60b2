"""Our models compute what those of transformers do: logits and every gradient, on random weights.

Packed documents are compared with each document run alone through theirs. Their norms and rotations
are computed in float32 even in a float64 model, which limits how closely that one can agree.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.hf_weights import from_hf, hf_names, to_hf
from torchtitan.models.registry import get_family
from torchtitan.models.spec import HFWeight, InitRule
from torchtitan.parallel.initialize import initialize_parameters

transformers = pytest.importorskip("transformers")

VOCAB = 97
LENGTHS = (50, 3, 27)
"""Tokens of the documents packed into a sequence."""
TINY = {"dim": 48, "n_layers": 3, "n_heads": 4, "ffn_dim": 80, "rope_theta": 10000.0}
TOLERANCES = [(torch.float32, 2e-5), (torch.float64, 2e-6)]
THEIR_NAMES = {
    "rope_scaling_type": "rope_type",
    "rope_scaling_factor": "factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
    "rope_attention_factor": "attention_factor",
}
CASES = [(name, variant) for name, row in FAMILIES.items() for variant in row.variants]


def args_of(name: str, **more: Any) -> DecoderArgs:
    args = get_family(name).resolve_args(
        "debugmodel", {**TINY, "n_kv_heads": 2, **FAMILIES[name].tiny, **more}, VOCAB
    )
    assert isinstance(args, DecoderArgs)
    return args


def build_ours(args: DecoderArgs, dtype: torch.dtype, name: str = "llama3") -> Decoder:
    model = get_family(name).build(args).to(dtype)
    # Larger than training starts from, so that attention is sharp and errors would show.
    initialize_parameters(model, lambda name: InitRule("normal", std=0.3), seed=1)
    return model


def build_theirs(name: str, args: DecoderArgs, dtype: torch.dtype, **settings: Any) -> Any:
    scaling = {THEIR_NAMES[name]: value for name, value in args.rope_scaling().items()}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta, **scaling}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=args.dim,
        intermediate_size=args.ffn_hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.num_kv_heads,
        head_dim=args.head_size(),
        max_position_embeddings=1024,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=args.tied_embeddings,
        attn_implementation="eager",
        **settings,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def sequence(packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and document ids, `[2, 80]`; the second row is the first one reversed."""
    lengths = LENGTHS if packed else (sum(LENGTHS),)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])
    both = torch.stack([tokens, tokens.flip(0)])
    return both, positions.expand(2, -1), ids.expand(2, -1) if packed else None


def their_logits(model: torch.nn.Module, tokens: Tensor, ids: Tensor | None) -> Tensor:
    """Each document through the model on its own, put together again."""
    if ids is None:
        return model(tokens).logits
    ends = list(itertools.accumulate(LENGTHS))
    parts = [model(tokens[:, end - n : end]).logits for n, end in zip(LENGTHS, ends)]
    return torch.cat(parts, dim=1)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def assert_equal_models(
    ours: Decoder, theirs: Any, table: Sequence[HFWeight], packed: bool, tolerance: float
) -> None:
    """Compare logits and gradients, after our weights were copied into their model."""
    args = ours.args
    missing = theirs.load_state_dict(to_hf(ours.state_dict(), table, args), strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if args.tied_embeddings else [])
    assert missing.unexpected_keys == []

    tokens, positions, ids = sequence(packed)
    our_logits = ours.head(ours(tokens, positions, ids))
    reference = their_logits(theirs, tokens, ids)
    assert our_logits.dtype == reference.dtype
    assert_close(our_logits, reference, tolerance, "logits")

    upstream = torch.randn(
        reference.shape, dtype=reference.dtype, generator=torch.Generator().manual_seed(2)
    )
    our_logits.backward(upstream)
    reference.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    converted = from_hf(gradients, table, args)
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], 5 * tolerance, name)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_logits_and_gradients(name, variant, n_kv_heads, tied, packed, dtype, tolerance):
    args = args_of(name, n_kv_heads=n_kv_heads, tied_embeddings=tied, **variant)
    row, table = FAMILIES[name], get_family(name).hf_weights
    theirs = build_theirs(row.transformers, args, dtype, **row.settings)
    assert_equal_models(build_ours(args, dtype, name), theirs, table, packed, tolerance)


BIASES = tuple(
    HFWeight(
        f"layers.{{n}}.attention.w{x}.bias", f"model.layers.{{n}}.self_attn.{x}_proj.bias", x != "v"
    )
    for x in "qkv"
)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_with_biases_it_is_qwen2(dtype, tolerance):
    args = DecoderArgs(**TINY, vocab_size=VOCAB, n_kv_heads=2, qkv_bias=True)
    table = (*get_family("llama3").hf_weights, *BIASES)
    assert_equal_models(
        build_ours(args, dtype), build_theirs("Qwen2", args, dtype), table, False, tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_a_model_that_pairs_neighbouring_channels(dtype, tolerance):
    """Ernie 4.5 is Llama with RoPE in our order, so no row of its table is reordered."""
    args = DecoderArgs(**TINY, vocab_size=VOCAB, n_kv_heads=2, head_dim=14)
    table = [HFWeight(row.ours, row.theirs) for row in get_family("llama3").hf_weights]
    theirs = build_theirs("Ernie4_5", args, dtype, pad_token_id=None)  # 0 would have no gradient
    assert_equal_models(build_ours(args, dtype), theirs, table, False, tolerance)


def test_without_parameters_in_its_norms_it_is_olmo():
    args = args_of("llama3", norm_type="np_layernorm", norm_eps=1e-5)
    ours = build_ours(args, torch.float64)
    theirs = build_theirs("Olmo", args, torch.float64)
    theirs.load_state_dict(to_hf(ours.state_dict(), get_family("llama3").hf_weights, args))
    tokens, positions, _ = sequence(packed=False)
    # Their norms are float32 in any model, so it cannot be closer than one of float32.
    assert_close(ours.head(ours(tokens, positions)), theirs(tokens).logits, 2e-5, "logits")


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_identity(name):
    args, table = args_of(name, tied_embeddings=False), get_family(name).hf_weights
    weights = build_ours(args, torch.float32, name).state_dict()
    back = from_hf(to_hf(weights, table, args), table, args)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_what_has_no_counterpart():
    table = get_family("llama3").hf_weights
    with pytest.raises(ValueError, match="layernorm without a bias"):
        hf_names([], table, args_of("llama3", norm_type="layernorm"))
    with pytest.raises(ValueError, match=r"no row for layers\.0\.attention\.wq\.bias"):
        hf_names(["layers.0.attention.wq.bias"], table, args_of("llama3"))
