"""Read an exported model back, and compare what it computes with the original.

Both models run one block at a time, filled right before its forward and emptied after it, so that
the memory is that of a block, the embedding and the head. The export's weights are compared bit by
bit on the way, so that an error names one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.spec import LanguageModel
from torchtitan.utils.dtypes import default_dtype
from torchtitan.utils.host import available_bytes
from torchtitan.weights.description import describe_model, differences
from torchtitan.weights.recognise import InvalidWeights
from torchtitan.weights.source import PIECE_BYTES, WeightSource, open_weights
from torchtitan.weights.stored_model import DtypeOf, StoredModel, convert, load

SAME_WEIGHTS = 1e-6
"""Bound of the KL divergence, in nats per token, of models whose weights are equal."""
BOUNDS = {"bfloat16": 1e-1, "float16": 1e-3}
"""The same where the export rounds weights to this type: docs/guides/export.md has measurements."""
_PROBE = (2, 128)
"""Sequences and tokens of the probe batch."""

Fill = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Readback:
    """KL divergences in nats per token; `transformers` is None where it was not asked."""

    ours: float
    bound: float
    transformers: float | None = None
    why_not: str = ""


def read_back(model: StoredModel, written: Path, dtype_of: DtypeOf, ties: bool = True) -> Readback:
    """Compare the model in `written` with the original.

    `dtype_of` is the type in which a tensor was written. With `ties` false the format stores tied
    weights twice. Raises `InvalidWeights` naming what differs.
    """
    description = describe_model(written)
    args = description.resolved()
    assert isinstance(args, DecoderArgs)
    if not ties:
        args = args.model_copy(update={"tied_embeddings": model.args.tied_embeddings})
    changed = differences(model.args, args)
    if changed:
        texts = (f"{name} is {theirs}, not {ours}" for name, (ours, theirs) in changed.items())
        raise InvalidWeights(f"the export's hyper-parameters differ: {', '.join(texts)}")
    source = open_weights(written, model.family, args)
    _require_same_tensors(model, source)
    tokens = probe(args)
    if model.reference is None:
        expected = logits_of(model.family, model.args, partial(load, model.weights), tokens)
    else:
        expected = model.reference(tokens)
    found = logits_of(model.family, args, partial(_fill_equal, model, source, dtype_of), tokens)
    bound = _bound(model, dtype_of)
    ours = divergence(expected, found)
    if not ours < bound:
        raise InvalidWeights(
            f"the export computes something else: a KL divergence of {ours:.2g}, above {bound:.2g}"
        )
    if source.kind != "hf":
        return Readback(ours, bound, why_not="it reads Hugging Face folders")
    why_not = why_no_transformers(model)
    if why_not:
        return Readback(ours, bound, why_not=why_not)
    theirs = divergence(found, _logits_of_transformers(written, tokens))
    if not theirs < SAME_WEIGHTS:
        raise InvalidWeights(
            "transformers computes something else with the export: a KL divergence of"
            f" {theirs:.2g}, above {SAME_WEIGHTS:.2g}, with equal weights"
        )
    return Readback(ours, bound, theirs)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Return the largest KL divergence of a token's distributions, from logits `[B, T, V]`."""
    worst = 0.0
    for p, q in zip(expected.flatten(0, 1).split(16), found.flatten(0, 1).split(16), strict=True):
        log_p, log_q = (F.log_softmax(x.double(), -1) for x in (p, q))
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        worst = max(worst, each.max().item()) if each.isfinite().all() else float("inf")
    return worst


def _bound(model: StoredModel, dtype_of: DtypeOf) -> float:
    tensors = model.weights.tensors
    rounded = {
        str(dtype_of(name)).removeprefix("torch.")
        for name, entry in tensors.items()
        if model.reference is not None or getattr(torch, entry["dtype"]) != dtype_of(name)
    }
    return max([SAME_WEIGHTS, *(BOUNDS.get(name, SAME_WEIGHTS) for name in rounded)])


def _require_same_tensors(model: StoredModel, source: WeightSource) -> None:
    ours = {name: entry["shape"] for name, entry in model.weights.tensors.items()}
    theirs = {name: entry["shape"] for name, entry in source.tensors.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            shapes = [shapes.get(name, "not there") for shapes in (ours, theirs)]
            raise InvalidWeights(f"{name} is {shapes[1]} in the export, not {shapes[0]}")


def _fill_equal(
    model: StoredModel,
    source: WeightSource,
    dtype_of: DtypeOf,
    tensors: Mapping[str, Tensor],
) -> None:
    """Fill tensors from the export; raise `InvalidWeights` for one that is not the original's."""
    load(source, tensors)
    for name, tensor in tensors.items():
        entry = model.weights.tensors[name]
        original = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        load(model.weights, {name: original})
        rows = max(1, PIECE_BYTES * len(tensor) // tensor.nbytes)
        for ours, theirs in zip(original.split(rows), tensor.split(rows), strict=True):
            if not torch.equal(convert(name, ours, dtype_of(name)).to(theirs.dtype), theirs):
                raise InvalidWeights(f"{name} differs in the export")


@torch.no_grad()
def logits_of(
    family: ModelFamily,
    args: DecoderArgs,
    fill: Fill,
    tokens: Tensor,
    change: Callable[[LanguageModel], object] = lambda model: None,
) -> Tensor:
    """Return logits `[B, T, V]` in float32; `fill` fills tensors by name.

    `change` may add to the model, which is on the meta device, or change its modules.
    """
    args = args.model_copy(update={"norm_type": args.norm_type.removeprefix("fused_")})
    with torch.device("meta"), default_dtype(torch.float32):
        model = family.build(args)
    change(model)  # type: ignore[arg-type]
    model.eval()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks: dict[str, nn.Module] = model.blocks()  # type: ignore[operator]
    of_blocks = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
    ends = [m for m in model.modules() if any(id(p) not in of_blocks for p in m.parameters(False))]

    for block in blocks.values():
        own = [names[id(parameter)] for parameter in block.parameters()]
        block.register_forward_pre_hook(partial(_fill_block, own, fill))
        block.register_forward_hook(_empty_block)
    filled: dict[str, nn.Parameter] = {}
    for module in ends:
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = names[id(parameter)]
            if name not in filled:
                filled[name] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
                fill({name: filled[name].data})
            module.register_parameter(key, filled[name])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    head: Any = model.head
    return head(model(tokens, positions))  # type: ignore[no-any-return]


def _fill_block(names: list[str], fill: Fill, block: nn.Module, _: Any) -> None:
    block.to_empty(device="cpu")
    parameters = zip(names, block.parameters(), strict=True)
    fill({name: parameter.data for name, parameter in parameters})


def _empty_block(block: nn.Module, *_: Any) -> None:
    block.to_empty(device="meta")


def probe(args: DecoderArgs) -> Tensor:
    """Return tokens `[B, T]` to compare models by."""
    assert args.vocab_size is not None
    batch, length = _PROBE
    generator = torch.Generator().manual_seed(0)
    shape = (batch, min(length, args.max_seq_len))
    return torch.randint(args.vocab_size, shape, generator=generator)


def why_no_transformers(model: StoredModel, package: str = "transformers") -> str:
    """Return why transformers, or a package on top of it, is not asked; empty if it is."""
    if find_spec("transformers") is None or find_spec(package) is None:
        return "it is not installed"
    num_bytes = 4 * sum(
        torch.empty(entry["shape"], device="meta").numel()
        for entry in model.weights.tensors.values()
    )
    if 1.5 * num_bytes > available_bytes():
        return f"its {num_bytes / 2**30:.1f} GiB in float32 do not fit into memory"
    return ""


@torch.no_grad()
def _logits_of_transformers(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    logits: Tensor = model.eval()(tokens).logits
    return logits


@torch.no_grad()
def logits_of_peft(base: Path, adapter: Path, tokens: Tensor) -> Tensor:
    """Return the logits `[B, T, V]` of a Hugging Face folder with an adapter, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    logits: Tensor = PeftModel.from_pretrained(model, adapter).eval()(tokens).logits
    return logits
