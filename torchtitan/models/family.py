"""A model family, and the hyper-parameters that a config asks for. No torch.

A family is data: flavors, a class of hyper-parameters and a function that builds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import validated
from torchtitan.config.schema import Model
from torchtitan.config.suggest import did_you_mean
from torchtitan.models.spec import HFWeight, LanguageModel, ModelArgs

if TYPE_CHECKING:
    from torch import nn

FROM_CHECKPOINT = "from_checkpoint"
"""The flavor whose hyper-parameters are those of `checkpoint.initial_load_path`, written to
`model.args` when the config is resolved."""
RESOLVED_ARG = "max_seq_len"
"""The hyper-parameter of every family, by which `model.args` that are resolved are recognised."""
_DEFAULT_NORM = Model.model_fields["norm_type"].default
_DECLARATIONS = (
    "head",
    "wrap_units",
    "blocks",
    "tensor_parallel_plan",
    "init_rule",
    "flops_per_token",
)


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

    def resolve_args(
        self, flavor: str, overrides: Mapping[str, Any], vocab_size: int | None = None
    ) -> ModelArgs:
        """Return the flavor's hyper-parameters with `overrides`, checked.

        `vocab_size` is the tokenizer's size, if known: it fills an unset `vocab_size` and must not
        exceed a set one. Raises `ConfigError` for an unknown flavor and for wrong hyper-parameters.
        """
        if flavor == FROM_CHECKPOINT and RESOLVED_ARG not in overrides:
            problem = "needs a checkpoint to take the hyper-parameters from"
            fix = "set checkpoint.initial_load_path, or choose a flavor"
            raise ConfigError(ConfigIssue("model.flavor", problem, fix, flavor))
        if flavor not in (FROM_CHECKPOINT, *self.flavors):
            problem, fix = f"unknown flavor of {self.name}", did_you_mean(flavor, self.flavors)
            raise ConfigError(ConfigIssue("model.flavor", problem, fix, flavor))
        base = self.flavors.get(flavor) or self.args_type()  # from_checkpoint overrides them all
        values = {**base.model_dump(), **overrides}
        if values.get("vocab_size") is None:
            values["vocab_size"] = vocab_size
        args: ModelArgs = validated(self.args_type, values, "model.args")
        problems = args.problems()
        if vocab_size is not None and args.vocab_size is not None and args.vocab_size < vocab_size:
            problem = f"smaller than the tokenizer's {vocab_size} tokens"
            fix = f"set it to at least {vocab_size}, or use the tokenizer that the flavor is for"
            problems.append(ConfigIssue("model.args.vocab_size", problem, fix, args.vocab_size))
        if problems:
            raise ConfigError(problems)
        return args


def require_language_model(model: nn.Module, family: str) -> None:
    """Raise TypeError for a model that lacks declarations of `LanguageModel`."""
    if not isinstance(model, LanguageModel):
        missing = [name for name in _DECLARATIONS if not hasattr(model, name)]
        raise TypeError(f"the model of family {family} lacks {', '.join(missing)}")
