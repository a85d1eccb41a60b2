"""Our Llama computes what Hugging Face's does: logits and every gradient, on random weights.

Packed documents are compared with each document run alone through theirs. Their norms and rotations
are computed in float32 even in a float64 model, which bounds how well that one can agree.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan.models.llama3.flavors import LlamaArgs
from torchtitan.models.llama3.hf import from_hf, hf_names, to_hf
from torchtitan.models.llama3.model import Llama
from torchtitan.models.spec import InitRule
from torchtitan.parallel.initialize import initialize_parameters

transformers = pytest.importorskip("transformers")

VOCAB = 97
LENGTHS = (50, 3, 27)
"""Tokens of the documents packed into a sequence."""


def llama_args(n_kv_heads: int, scaled: bool, tied: bool) -> LlamaArgs:
    return LlamaArgs(
        vocab_size=VOCAB,
        dim=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        ffn_dim=80,
        rope_theta=10000.0,
        # Of 6 frequencies some are stretched, some are not, and one lies between.
        rope_scaling_factor=4.0 if scaled else 1.0,
        rope_original_max_seq_len=64,
        tied_embeddings=tied,
    )


def build_ours(args: LlamaArgs, dtype: torch.dtype) -> Llama:
    model = Llama(args).to(dtype)
    # Larger than training starts from, so that attention is sharp and errors would show.
    initialize_parameters(model, lambda name: InitRule("normal", std=0.3), seed=1)
    return model


def build_theirs(args: LlamaArgs, dtype: torch.dtype) -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    config = their_config(
        transformers.LlamaConfig, args, rms_norm_eps=args.norm_eps, rope_parameters=rope
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def their_config(kind: type, args: LlamaArgs, **settings: Any) -> Any:
    return kind(
        vocab_size=VOCAB,
        hidden_size=args.dim,
        intermediate_size=args.ffn_hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.num_kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=args.tied_embeddings,
        attn_implementation="eager",
        **settings,
    )


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 2e-6)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaled", [False, True], ids=["rope", "scaled-rope"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_logits_and_gradients(n_kv_heads, scaled, tied, packed, dtype, tolerance):
    args = llama_args(n_kv_heads, scaled, tied)
    ours, theirs = build_ours(args, dtype), build_theirs(args, dtype)
    missing = theirs.load_state_dict(to_hf(ours.state_dict(), args), strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    assert missing.unexpected_keys == []

    tokens, positions, ids = sequence(packed)
    our_logits = ours.head(ours(tokens, positions, ids))
    reference = their_logits(theirs, tokens, ids)
    assert our_logits.dtype == dtype
    assert_close(our_logits, reference, tolerance, "logits")

    upstream = torch.randn(reference.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    our_logits.backward(upstream)
    reference.backward(upstream)
    gradients = dict(theirs.named_parameters())
    converted = from_hf({name: gradients[name].grad for name in hf_names(args).values()}, args)
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], 5 * tolerance, name)


def test_there_and_back_is_the_identity():
    args = llama_args(2, scaled=False, tied=False)
    weights = build_ours(args, torch.float32).state_dict()
    back = from_hf(to_hf(weights, args), args)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_without_parameters_in_its_norms_it_is_olmo():
    args = llama_args(2, scaled=False, tied=False).model_copy(
        update={"norm_type": "np_layernorm", "norm_eps": 1e-5}
    )
    ours = build_ours(args, torch.float64)
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    config = their_config(transformers.OlmoConfig, args, rope_parameters=rope)
    theirs = transformers.OlmoForCausalLM(config).double()
    theirs.load_state_dict(to_hf(ours.state_dict(), args))
    tokens, positions, _ = sequence(packed=False)
    # Their norms are float32 in any model, so it cannot be closer than one of float32.
    assert_close(ours.head(ours(tokens, positions)), theirs(tokens).logits, 2e-5, "logits")


def test_layernorm_has_no_counterpart():
    args = llama_args(2, scaled=False, tied=False).model_copy(update={"norm_type": "layernorm"})
    with pytest.raises(ValueError, match="Llama with layernorm"):
        hf_names(args)
