"""What a model family gives the rest of the library. No torch.

A family is data (`ModelFamily`: flavors, a class of hyper-parameters, a build function) and a model
that *declares* what the library then applies: which modules to wrap together, how each parameter
starts, which modules are its blocks, what a token costs. Nothing in a model knows of a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import Model, PositiveInt, Section
from torchtitan.config.suggest import did_you_mean
from torchtitan.config.value_errors import problems_of_table

if TYPE_CHECKING:
    from torch import Tensor, nn

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")
_USUAL_NORM = Model.model_fields["norm_type"].default


class ModelArgs(Section):
    """Hyper-parameters that every family has. A family's class adds its own."""

    vocab_size: PositiveInt | None = None
    """Tokens in the vocabulary. Unset: the tokenizer's."""

    max_seq_len: PositiveInt = 131072
    """Longest sequence that the model is made for."""

    def problems(self) -> list[ConfigIssue]:
        """What no single value shows: hyper-parameters that do not fit each other."""
        return []

    def modules(self) -> dict[str, int]:
        """The top-level modules in the order of the forward, with their numbers of parameters:
        a pipeline may cut between any two. Needs `vocab_size`. Empty: the model cannot be cut."""
        return {}

    def hidden_size(self) -> int:
        """Channels of the hidden states, which are what passes between the stages of a pipeline."""
        raise NotImplementedError

    def heads(self) -> tuple[int, int] | None:
        """Heads of queries, and of keys and values, where attention has such."""
        return None

    def attention_window(self) -> int | None:
        """The last tokens, itself among them, that a token attends to, where these are limited."""
        return None

    def tensor_parallel_problems(self, degree: int) -> list[ConfigIssue]:
        """What keeps single matrices from being cut over `degree` ranks."""
        problem = "this model cannot be cut within its matrices"
        return [ConfigIssue("parallelism.tensor_parallel_degree", problem, "set it to 1", degree)]


@dataclass(frozen=True)
class WrapUnit:
    """Modules whose parameters are gathered, used and freed together."""

    name: str
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class InitRule:
    """How a parameter starts: "constant" at `value`, or "normal" with mean 0 and `std`.

    With `cutoff_in_std` c the normal distribution is truncated to [-c * std, c * std]. Raises
    ValueError for another kind, which would be taken for a normal one, and for a negative `std`.
    """

    kind: Literal["normal", "constant"]
    std: float = 0.0
    cutoff_in_std: float | None = None
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "constant") or self.std < 0:
            raise ValueError(f'{self} has to be "normal" with std >= 0, or "constant"')


class TensorParallelStyles(Protocol[S_co]):
    """The ways in which tensor parallelism cuts a module over ranks.

    Between cut modules the hidden states are `[B, T/tp, D]`: each rank has a part of the sequence.
    """

    def embedding(self) -> S_co:
        """Each rank holds some rows. Tokens `[B, T]` in, a part of the sequence out."""

    def norm(self) -> S_co:
        """Each rank holds all, and works on its part of the sequence."""

    def prepare_module_input(self) -> S_co:
        """Its first input is the whole sequence again. Parameters of its own are held whole; each
        rank uses them for its heads or channels."""

    def colwise(self, units: int | None = None) -> S_co:
        """A linear map of the whole sequence; each rank has some of the outputs. They come in
        `units` (heads) that are not cut: where there are fewer than ranks, ranks share one."""

    def rowwise(self) -> S_co:
        """A linear map of what `colwise` gave; a part of the sequence out. Its `bias` is added to
        the sum over ranks once."""

    def head(self) -> S_co:
        """A linear map to logits: a part of the sequence in, all of it out, for some tokens of the
        vocabulary."""


@runtime_checkable
class LanguageModel(Protocol):
    """What the library asks of a model beside being an `nn.Module`."""

    def forward(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states `[B, T, D]` after the final norm. With `document_ids` `[B, T]` a position
        attends within its document only, else to everything before it. What modules are left in a
        stage of a pipeline decides where it begins and ends: without embeddings `tokens` are the
        hidden states of the stage before, without the final norm its own are returned."""

    @property
    def head(self) -> nn.Module:
        """`head(hidden)` gives logits `[B, T, V]`; `head(hidden, consume)` gives
        `consume(hidden, weight)`, called inside the head's forward."""

    def keep_modules(self, names: Collection[str]) -> None:
        """Drop the top-level modules (those of `ModelArgs.modules`) that are not in `names`."""

    def wrap_units(self) -> list[WrapUnit]:
        """What is gathered for its own forward only, in that order. Parameters in no unit are
        gathered from the start of the forward to the end of the backward."""

    def blocks(self) -> dict[str, nn.Module]:
        """The repeated blocks by full name, in the order of the forward."""

    def tensor_parallel_plan(self, styles: TensorParallelStyles[S]) -> dict[str, S]:
        """A style for every module that has parameters, or that needs one, by name."""

    def init_rule(self, name: str) -> InitRule:
        """Return the rule by which a parameter starts. Raises LookupError for an unknown name."""

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Floating point operations of forward and backward per token."""


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: the same code in several sizes."""

    name: str
    args_type: type[ModelArgs]
    flavors: Mapping[str, ModelArgs]
    build: Callable[[Any], nn.Module] = field(repr=False)
    """Builds the model of resolved hyper-parameters; to be called under `torch.device("meta")`."""

    def resolve_args(
        self, flavor: str, overrides: Mapping[str, Any], vocab_size: int | None = None
    ) -> ModelArgs:
        """The flavor's hyper-parameters with `overrides`, checked.

        `vocab_size` is the tokenizer's size, where known: it fills an unset `vocab_size` and must
        not be larger than a set one. Raises `ConfigError` with every problem found.
        """
        base = lookup(self.flavors, flavor, "model.flavor", f"flavor of {self.name}")
        values = {**base.model_dump(), **overrides}
        if values.get("vocab_size") is None and vocab_size is not None:
            values["vocab_size"] = vocab_size
        problems = [
            self._unknown(name) for name in overrides if name not in self.args_type.model_fields
        ]
        known = {
            name: value for name, value in values.items() if name in self.args_type.model_fields
        }
        try:
            args = self.args_type(**known)
        except ValidationError as error:
            problems += problems_of_table(error, "model.args", self.args_type)
            raise ConfigError(problems) from None
        problems += args.problems()
        if vocab_size is not None and args.vocab_size is not None and args.vocab_size < vocab_size:
            problems.append(
                ConfigIssue(
                    "model.args.vocab_size",
                    f"smaller than the tokenizer's {vocab_size} tokens",
                    f"set it to at least {vocab_size}, or use the tokenizer that the flavor is for",
                    value=args.vocab_size,
                )
            )
        if problems:
            raise ConfigError(problems)
        return args

    def resolve(self, model: Model, vocab_size: int | None = None) -> ModelArgs:
        """`resolve_args` of what the section `[model]` says, with its `norm_type` among them."""
        overrides = dict(model.args)
        if model.norm_type != _USUAL_NORM:
            if "norm_type" not in self.args_type.model_fields:
                problem = f"the family {self.name} has no choice of norms"
                raise ConfigError(
                    ConfigIssue("model.norm_type", problem, "remove it", model.norm_type)
                )
            if overrides.setdefault("norm_type", model.norm_type) != model.norm_type:
                problem = "model.args.norm_type says otherwise"
                raise ConfigError(
                    ConfigIssue(
                        "model.norm_type", problem, "remove one of the two", model.norm_type
                    )
                )
        return self.resolve_args(model.flavor, overrides, vocab_size)

    def _unknown(self, name: str) -> ConfigIssue:
        names = self.args_type.model_fields
        fix = did_you_mean(name, names)
        return ConfigIssue(f"model.args.{name}", f"unknown hyper-parameter of {self.name}", fix)


def lookup(table: Mapping[str, T], name: str, key: str, kind: str) -> T:
    """`table[name]`; `ConfigError` about `key` with the nearest names when there is none."""
    if name in table:
        return table[name]
    raise ConfigError(ConfigIssue(key, f"unknown {kind}", did_you_mean(name, table), value=name))


_DECLARATIONS = (
    "head",
    "wrap_units",
    "blocks",
    "tensor_parallel_plan",
    "init_rule",
    "flops_per_token",
)


def require_language_model(model: nn.Module, family: str) -> None:
    """Raises TypeError for a model that does not declare what a `LanguageModel` does."""
    if not isinstance(model, LanguageModel):
        missing = [name for name in _DECLARATIONS if not hasattr(model, name)]
        raise TypeError(f"the model of family {family} lacks {', '.join(missing)}")
