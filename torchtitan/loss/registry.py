"""Losses by name. No torch: a loss's code is imported when it is used, its settings before.

A third party adds one by the decorator `register_loss` in a module that `job.custom_import` names,
or by an entry point of the group `torchtitan.losses`, which gives the class, or (so that checking a
config imports no torch) a `LossEntry` that imports the class when it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from torchtitan.config.paths import PathText
from torchtitan.config.registry import Registry, lazily, settings_of, validated
from torchtitan.config.schema import (
    Fraction,
    Loss,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)

L = TypeVar("L", bound=type)
_REQUIRED = ("count", "sum")


class CrossEntropySettings(Section):
    """Settings of `cross_entropy`."""

    z_loss_weight: NonNegativeFloat = 0.0
    """Adds this times the mean of log(Z)^2 over the targets, where Z is the sum of the
    exponentials of a token's logits: it keeps logits from drifting. PaLM's is 1e-4; 0 is off."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This much of a target's probability is spread evenly over the whole vocabulary, as in
    `torch.nn.functional.cross_entropy`; 0 is off."""

    @property
    def plain(self) -> bool:
        """True for the cross entropy without further terms."""
        return not self.z_loss_weight and not self.label_smoothing


class DPOSettings(Section):
    """Settings of `dpo`."""

    variant: Literal["sigmoid", "robust", "ipo", "simpo"] = "sigmoid"
    """The loss of a pair: DPO's, robust DPO's, IPO's (of log-probabilities a token), or SimPO's (of
    log-probabilities a token, without a reference)."""

    beta: PositiveFloat = 0.1
    """Scales the rewards: the larger, the closer the model stays to the reference. SimPO takes
    values around 2; 1 / (2 beta) is the target of IPO."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs that are labelled the wrong way round; for `sigmoid` (conservative DPO),
    `robust` and `simpo`."""

    margin: NonNegativeFloat = 0.0
    """The reward by which the chosen answer should lead, SimPO's gamma; for `simpo`."""

    reference: Literal["start", "base"] = "start"
    """The model to compare with: a frozen copy of the weights that the run started from, or the
    model without its adapters, which takes no memory."""

    reference_path: PathText | None = Field(default=None, examples=["hf://owner/name"])
    """Weights of the frozen copy, in any format of `checkpoint.initial_load_path`. Unset: those
    that the run starts from."""

    reference_cache: PathText | None = Field(default=None, examples=["reference"])
    """Folder of files with the reference's log-probabilities, computed once before the first step:
    steps need no second model then. Other runs may share it. Unset: computed in each step."""

    @field_validator("label_smoothing", "margin", "reference_path", "reference_cache")
    @classmethod
    def _of_the_variant(cls, value: Any, info: ValidationInfo) -> Any:
        variant = info.data.get("variant")
        ignored = {
            "label_smoothing": variant == "ipo",
            "margin": variant != "simpo",
            "reference_path": variant == "simpo" or info.data.get("reference") == "base",
            "reference_cache": variant == "simpo",
        }
        if value and variant and info.field_name and ignored[info.field_name]:
            reason = f'the variant "{variant}"'
            if info.field_name == "reference_path" and variant != "simpo":
                reason = 'reference = "base"'
            raise ValueError(f"is not used by {reason}. Fix: leave it out")
        return value

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares with a reference."""
        return self.variant != "simpo"

    @property
    def averages(self) -> bool:
        """True if the loss is of log-probabilities a token instead of their sums."""
        return self.variant in ("ipo", "simpo")


class DistillationSettings(Section):
    """Settings of `distillation`."""

    teacher_path: PathText | None = Field(default=None, examples=["hf://owner/name"])
    """The teacher: a step of this library, a Hugging Face folder, Meta's or a GGUF, with the same
    tokenizer. It may be of another family and size."""

    weight: Fraction = 0.5
    """The share of the divergence in the loss; the rest is the cross entropy."""

    temperature: PositiveFloat = 1.0
    """Divides the logits of both models: above 1 unlikely tokens count more."""

    top_k: PositiveInt | None = Field(default=None, examples=[64])
    """Compare only the teacher's most likely tokens, which are recorded as numbers of them. Unset:
    the whole vocabulary."""

    @field_validator("teacher_path")
    @classmethod
    def _is_set(cls, value: str | None) -> str:
        if value is None:
            raise ValueError("is unset. Fix: name the teacher's weights")
        return value


@dataclass(frozen=True)
class LossEntry:
    """A loss: its settings model, and a function that imports and returns its class.

    The class is called with the settings, the number of chunks or None, and the `VocabShard` or
    None.
    """

    settings: type[Section]
    load: Callable[[], Callable[..., Any]]
    supports_vocab_parallel: bool = False
    """True if it is correct where a rank has the logits of a part of the vocabulary only."""
    reads_pairs: bool = False
    """True if its batches are pairs of a chosen and a rejected answer."""


def entry_of(name: str, thing: Any) -> LossEntry:
    """Return the entry of what is registered under `name`. Raises TypeError if it is no loss."""
    if isinstance(thing, LossEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the loss {name} is neither a class nor a LossEntry")
    missing = [method for method in _REQUIRED if not callable(getattr(thing, method, None))]
    if missing:
        raise TypeError(f"the loss {name} lacks {', '.join(missing)}")
    settings = settings_of(thing, f"the loss {name}")
    return LossEntry(
        settings,
        lambda: thing,
        bool(getattr(thing, "supports_vocab_parallel", False)),
        bool(getattr(thing, "reads_pairs", False)),
    )


LOSSES: Registry[LossEntry] = Registry("loss.name", "torchtitan.losses", entry_of)
LOSSES.add_built_in(
    "cross_entropy",
    LossEntry(CrossEntropySettings, lazily("torchtitan.loss.cross_entropy:CrossEntropyLoss"), True),
)
LOSSES.add_built_in(
    "dpo",
    LossEntry(DPOSettings, lazily("torchtitan.loss.preference:DPOLoss"), True, reads_pairs=True),
)
LOSSES.add_built_in(
    "distillation",
    LossEntry(DistillationSettings, lazily("torchtitan.loss.distillation:DistillationLoss"), True),
)


def register_loss(name: str) -> Callable[[L], L]:
    """Decorate a class to make it available as the loss `name`.

    Raises ValueError for a taken name, TypeError for a class that is not a loss.
    """
    return LOSSES.decorator(name)


def loss_settings(section: Loss) -> Any:
    """Return the settings in `[loss.args]`, checked by the loss that `section` names.

    Raises ConfigError naming each unknown or invalid setting.
    """
    settings = LOSSES[section.name].settings
    return validated(settings, section.args, "loss.args")
