"""The interface between a model and the rest of the library. No torch.

A model *declares* what the library then applies: which modules to wrap together, how each parameter
starts, which modules are its blocks, what a token costs. It knows nothing about the mesh.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import PositiveInt, Section

if TYPE_CHECKING:
    from torch import Tensor, nn

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class ModelArgs(Section):
    """Hyper-parameters of every family, and what follows from them. A family adds its own."""

    vocab_size: PositiveInt | None = None
    """Tokens in the vocabulary. Unset: the tokenizer's."""

    max_seq_len: PositiveInt = 131072
    """Longest supported sequence."""

    def problems(self) -> list[ConfigIssue]:
        """Return what is wrong with values that are valid by themselves but do not fit together."""
        return []

    def modules(self) -> dict[str, int]:
        """Return the parameter counts of the top-level modules, in the order of the forward.

        A pipeline may cut between any two. Needs `vocab_size`. Empty: no pipeline is possible.
        """
        return {}

    def hidden_size(self) -> int:
        """Return the channels of the hidden states, which pipeline stages exchange."""
        raise NotImplementedError

    def heads(self) -> tuple[int, int] | None:
        """Return the numbers of query heads and of key and value heads; None without attention."""
        return None

    def head_size(self) -> int:
        """Return the channels of a head. Needs `heads`."""
        heads = self.heads()
        assert heads is not None
        return self.hidden_size() // heads[0]

    def attention_window(self) -> int | None:
        """Return how many of the latest tokens a token attends to, itself included; None: all."""
        return None

    def tensor_parallel_problems(self, degree: int) -> list[ConfigIssue]:
        """Return why single matrices cannot be sharded over `degree` ranks."""
        problem = "this model has no tensor-parallel plan"
        return [ConfigIssue("parallelism.tensor_parallel_degree", problem, "set it to 1", degree)]


@dataclass(frozen=True)
class WrapUnit:
    """Modules whose parameters are gathered, used and freed together."""

    name: str
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class InitRule:
    """The initial values of a parameter: "constant" at `value`, or "normal" with mean 0 and `std`.

    With `cutoff_in_std` c the normal distribution is truncated to [-c * std, c * std]. Raises
    ValueError for another kind or a negative `std`.
    """

    kind: Literal["normal", "constant"]
    std: float = 0.0
    cutoff_in_std: float | None = None
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "constant") or self.std < 0:
            raise ValueError(f'{self} has to be "normal" with std >= 0, or "constant"')


class TensorParallelStyles(Protocol[S_co]):
    """The ways in which tensor parallelism shards a module over ranks.

    Between sharded modules the hidden states are `[B, T/tp, D]`: a part of the sequence per rank.
    """

    def embedding(self) -> S_co:
        """Shard rows. Tokens `[B, T]` in, a part of the sequence out."""

    def norm(self) -> S_co:
        """Replicate; each rank works on its part of the sequence, or on its heads."""

    def prepare_module_input(self) -> S_co:
        """Gather the first input to the whole sequence.

        The module's own parameters are replicated; each rank uses them for its heads or channels.
        """

    def colwise(self, units: int | None = None) -> S_co:
        """Shard the outputs of a linear layer that takes the whole sequence.

        Outputs come in `units` (heads) that stay whole; ranks share one if there are fewer units.
        """

    def rowwise(self) -> S_co:
        """Shard the inputs of a linear layer that follows `colwise`; a part of the sequence out.

        A `bias` is added to the sum over ranks once.
        """

    def head(self) -> S_co:
        """Shard the vocabulary of the last layer: a part of the sequence in, all of it out."""


@runtime_checkable
class LanguageModel(Protocol):
    """The interface of a model, in addition to that of `nn.Module`."""

    def forward(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states `[B, T, D]` after the final norm.

        With `document_ids` `[B, T]` a position attends within its document only. In a pipeline
        stage without embeddings, `tokens` are the hidden states of the stage before; a stage
        without the final norm returns its own.
        """

    @property
    def head(self) -> nn.Module:
        """The last layer, hidden states to logits `[B, T, V]`.

        `head(hidden, consume)` gives `consume(hidden, weight)`, called inside its forward.
        """

    def keep_modules(self, names: Collection[str]) -> None:
        """Drop the modules of `ModelArgs.modules` that are not in `names`."""

    def wrap_units(self) -> list[WrapUnit]:
        """Return the modules that are gathered for their own forward only, in forward order.

        Parameters in no unit stay gathered from the first forward to the end of the backward.
        """

    def blocks(self) -> dict[str, nn.Module]:
        """Return the repeated blocks by full name, in forward order."""

    def tensor_parallel_plan(self, styles: TensorParallelStyles[S]) -> dict[str, S]:
        """Return a style by name for every module that has parameters, or that needs one."""

    def init_rule(self, name: str) -> InitRule:
        """Return the rule by which a parameter starts. Raises LookupError for an unknown name."""

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Return the floating point operations of forward and backward per token."""


@dataclass(frozen=True)
class HFWeight:
    """A parameter's name in this library and in Hugging Face's; `{n}` is the layer's number."""

    ours: str
    theirs: str
    rope: bool = False
    """Rows are RoPE channels that they store as two halves of a head, we as neighbouring pairs."""
    tied: bool = False
    """Missing where embeddings are tied."""
