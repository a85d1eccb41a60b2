"""Weights between our names and those of Hugging Face's `LlamaForCausalLM`.

With `np_layernorm`, which has no weights to name, they are those of `OlmoForCausalLM`.
Two things differ. Names; and RoPE's pairs: ours are neighbouring channels (0, 1), (2, 3), ..., as
in Meta's code, theirs are channel i of the first half of a head with channel i of the second half.
The rows of the query and key projections are therefore in another order.
"""

from collections.abc import Mapping

from torch import Tensor

from torchtitan.models.llama3.flavors import LlamaArgs

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ROTATED = ("attention.wq.weight", "attention.wk.weight")


def hf_names(args: LlamaArgs) -> dict[str, str]:
    """Hugging Face's name of every parameter, by ours. Tied weights count once, as embedding.

    Raises ValueError for `layernorm`: no model there has weights of norms without a bias.
    """
    if args.norm_type == "layernorm":
        raise ValueError("no model of Hugging Face's is a Llama with layernorm")
    names = dict(_TOP)
    if args.tied_embeddings:
        del names["output.weight"]
    for layer in range(args.n_layers):
        for ours, theirs in _BLOCK.items():
            names[f"layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    if args.norm_type == "np_layernorm":
        names = {ours: theirs for ours, theirs in names.items() if not ours.endswith("norm.weight")}
    return names


def to_hf(weights: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """Our whole weights under their names and in their order. `KeyError` when one is missing."""
    converted = {}
    for ours, theirs in hf_names(args).items():
        weight = weights[ours]
        if ours.endswith(_ROTATED):
            weight = _swap_pairing(weight, args.head_dim // 2, 2)
        converted[theirs] = weight
    return converted


def from_hf(weights: Mapping[str, Tensor], args: LlamaArgs) -> dict[str, Tensor]:
    """Their whole weights under our names and in our order. `KeyError` when one is missing."""
    converted = {}
    for ours, theirs in hf_names(args).items():
        weight = weights[theirs]
        if ours.endswith(_ROTATED):
            weight = _swap_pairing(weight, 2, args.head_dim // 2)
        converted[ours] = weight
    return converted


def _swap_pairing(weight: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of each head `[outer, inner]` to `[inner, outer]`; `weight` is `[heads * hd, D]`."""
    heads = weight.unflatten(0, (-1, outer, inner))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()
