"""Families that do what the built-in ones do not: share parameters, have biases, adapters of a low
rank, or dropout.

`register()` makes them known to `model.name`, in whatever process calls it.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.decoder.model import Attention, Block, Decoder
from torchtitan.models.family import ModelFamily
from torchtitan.models.llama3 import FLAVORS, LlamaArgs
from torchtitan.models.registry import register_family
from torchtitan.models.spec import InitRule


class TiedLlama(Decoder):
    """Its ends are one matrix, and nothing that it declares knows of it."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        assert self.output is not None and self.tok_embeddings is not None
        self.output.weight = self.tok_embeddings.weight


class SharingLlama(Decoder):
    """Two blocks share a feed-forward, a module, and a matrix of their attention, a parameter."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        share(self)


def share(model: nn.Module) -> None:
    """Let the first two blocks share what `SharingLlama` says."""
    first, second = (model.get_submodule(f"layers.{n}") for n in range(2))
    second.feed_forward = first.feed_forward
    second.attention.wo.weight = first.attention.wo.weight  # type: ignore[union-attr]


class RepeatedLlama(Decoder):
    """All blocks are one."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        block = self.layers["0"]
        for key in self.layers:
            self.layers[key] = block


class ScaledAttention(Attention):
    """With a parameter of its own: it scales channels of the queries."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        self.scale = nn.Parameter(torch.empty(args.head_size()))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return q * self.scale, k, v


class ScaledBlock(Block):
    attention_type = ScaledAttention


class BiasedLlama(Decoder):
    """Every linear of a block has a bias, as GPT-2's, and its attention a parameter of its own."""

    block_type = ScaledBlock

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        for block in self.layers.values():
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.bias = nn.Parameter(torch.empty(module.out_features))

    def init_rule(self, name: str) -> InitRule:
        """Biases and scales are no constants, else a mistake with one would not show."""
        if name.endswith((".bias", ".scale")):
            return InitRule("normal", std=0.3)
        return super().init_rule(name)


class LowRankLinear(nn.Linear):
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_a), self.lora_b)


def add_low_rank(model: Any, rank: int = 3) -> None:
    """Adapt a matrix that is cut by columns, one that ranks share, and one that is cut by rows."""
    for block in model.blocks().values():
        for linear in (block.attention.wq, block.attention.wk, block.attention.wo):
            linear.__class__ = LowRankLinear
            linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
            linear.lora_b = nn.Parameter(torch.empty(linear.out_features, rank))


def keep_low_rank_whole(plan: dict[str, Any]) -> None:
    """Change the tensor-parallel plan of what `add_low_rank` has changed."""
    for name, style in plan.items():
        if name.endswith((".wq", ".wk")):
            plan[name] = replace(style, whole=("lora_a",))
        elif name.endswith(".wo"):
            plan[name] = replace(style, whole=("lora_b",))


LOW_RANK_RULE = InitRule("normal", std=0.1)


class LowRankLlama(Decoder):
    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        add_low_rank(self)

    def tensor_parallel_plan(self, styles: Any) -> dict[str, Any]:
        plan = super().tensor_parallel_plan(styles)
        keep_low_rank_whole(plan)
        return plan

    def init_rule(self, name: str) -> InitRule:
        return LOW_RANK_RULE if "lora" in name else super().init_rule(name)


P = 0.25


class DroppingLinear(nn.Linear):
    """Drops some of its input, which tensor ranks have whole, as LoRA's adapters do."""

    dropout: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def add_dropout(model: Any) -> None:
    """Drop in every place that a mesh treats differently: hidden states after the embedding, within
    each block and after the norm, hidden channels, and the input of a matrix."""
    for block in model.blocks().values():
        block.attention.register_forward_hook(_drop)
        block.feed_forward.w1.register_forward_hook(_drop)  # a part of them, with tensor ranks
        block.attention.wq.__class__ = DroppingLinear
        block.attention.wq.dropout = nn.Dropout(P)
    for end in (model.tok_embeddings, model.norm):
        end.register_forward_hook(_drop)


def _drop(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return F.dropout(out, P, module.training)


class DroppingLlama(Decoder):
    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        add_dropout(self)


def _family(name: str, model: type[Decoder]) -> ModelFamily:
    def build(args: LlamaArgs) -> nn.Module:
        return model(args)

    return ModelFamily(name, LlamaArgs, FLAVORS, build)


FAMILIES = [
    _family("tied naively", TiedLlama),
    _family("shared by blocks", SharingLlama),
    _family("one block", RepeatedLlama),
    _family("biased", BiasedLlama),
    _family("low rank", LowRankLlama),
    _family("dropping", DroppingLlama),
]


def register() -> None:
    """Make the families known, once or again."""
    for family in FAMILIES:
        register_family(family)
