"""The interface between a model family and the rest of the library. No torch.

A family is data (`ModelFamily`: flavors, a class of hyper-parameters, a build function) and a model
that *declares* what the library then applies: which modules to wrap together, how each parameter
starts, which modules are its blocks, what a token costs. A model knows nothing about the mesh.
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
_DEFAULT_NORM = Model.model_fields["norm_type"].default
FROM_CHECKPOINT = "from_checkpoint"
"""The flavor whose hyper-parameters are those of `checkpoint.initial_load_path`, written to
`model.args` when the config is resolved."""
RESOLVED_ARG = "max_seq_len"
"""The hyper-parameter of every family, by which `model.args` that are resolved are recognised."""


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


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: one architecture in several sizes."""

    name: str
    args_type: type[ModelArgs]
    flavors: Mapping[str, ModelArgs]
    build: Callable[[Any], nn.Module] = field(repr=False)
    """Build the model of resolved hyper-parameters; called under `torch.device("meta")`."""
    hf_weights: tuple[HFWeight, ...] = ()
    """Names in Hugging Face's checkpoints; see `models/hf_weights.py`."""
    hf_architectures: tuple[str, ...] = ()
    """Classes of transformers that compute the same; see `weights/hf_config.py`."""

    def resolve_args(
        self, flavor: str, overrides: Mapping[str, Any], vocab_size: int | None = None
    ) -> ModelArgs:
        """Return the flavor's hyper-parameters with `overrides`, checked.

        `vocab_size` is the tokenizer's size, if known: it fills an unset `vocab_size` and must not
        exceed a set one. Raises `ConfigError` with every problem found.
        """
        if flavor == FROM_CHECKPOINT:
            base = self.args_type()
            if RESOLVED_ARG not in overrides:
                problem = "needs a checkpoint to take the hyper-parameters from"
                fix = "set checkpoint.initial_load_path, or choose a flavor"
                raise ConfigError(ConfigIssue("model.flavor", problem, fix, flavor))
        else:
            base = lookup(self.flavors, flavor, "model.flavor", f"flavor of {self.name}")
        values = {**base.model_dump(), **overrides}
        if values.get("vocab_size") is None:
            values["vocab_size"] = vocab_size
        fields = self.args_type.model_fields
        problems = [
            ConfigIssue(
                f"model.args.{name}",
                f"unknown hyper-parameter of {self.name}",
                did_you_mean(name, fields),
            )
            for name in overrides
            if name not in fields
        ]
        try:
            args = self.args_type(**{name: values[name] for name in values if name in fields})
        except ValidationError as error:
            problems += problems_of_table(error, "model.args", self.args_type)
            raise ConfigError(problems) from None
        problems += args.problems()
        if vocab_size is not None and args.vocab_size is not None and args.vocab_size < vocab_size:
            problem = f"smaller than the tokenizer's {vocab_size} tokens"
            fix = f"set it to at least {vocab_size}, or use the tokenizer that the flavor is for"
            problems.append(ConfigIssue("model.args.vocab_size", problem, fix, args.vocab_size))
        if problems:
            raise ConfigError(problems)
        return args

    def resolve(self, model: Model, vocab_size: int | None = None) -> ModelArgs:
        """Return `resolve_args` of the section `[model]`, `norm_type` included."""
        overrides, problem = dict(model.args), ""
        if model.norm_type != _DEFAULT_NORM:
            if "norm_type" not in self.args_type.model_fields:
                problem = f"the family {self.name} has no choice of norms"
            elif overrides.setdefault("norm_type", model.norm_type) != model.norm_type:
                problem = "model.args.norm_type says otherwise"
        if problem:
            raise ConfigError(ConfigIssue("model.norm_type", problem, "remove it", model.norm_type))
        return self.resolve_args(model.flavor, overrides, vocab_size)


def lookup(table: Mapping[str, T], name: str, key: str, kind: str) -> T:
    """Return `table[name]`; raise `ConfigError` about `key` with the nearest names if missing."""
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
    """Raise TypeError for a model that lacks declarations of `LanguageModel`."""
    if not isinstance(model, LanguageModel):
        missing = [name for name in _DECLARATIONS if not hasattr(model, name)]
        raise TypeError(f"the model of family {family} lacks {', '.join(missing)}")
