"""Losses by name. No torch: a loss's code is imported when it is used, its settings before.

A third party adds one by the decorator `register_loss` in a module that `job.custom_import` names,
or by an entry point of the group `torchtitan.losses`, which gives the class, or (so that checking a
config imports no torch) a `LossEntry` that imports the class when it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torchtitan.config.registry import Registry, lazily
from torchtitan.config.schema import Loss, Section
from torchtitan.config.value_errors import validated
from torchtitan.loss.settings import CrossEntropySettings

L = TypeVar("L", bound=type)
_REQUIRED = ("count", "sum")


@dataclass(frozen=True)
class LossEntry:
    """A loss: its settings' model, and a function that imports and returns its class, which is
    called with the settings, the number of chunks, and the part of the vocabulary; both or None."""

    settings: type[Section]
    load: Callable[[], Callable[..., Any]]
    takes_cut_vocabulary: bool = False
    """Whether it is right where each rank has the logits of a part of the vocabulary only."""


def entry_of(name: str, thing: Any) -> LossEntry:
    """What is registered under `name`, if it is one. Raises TypeError."""
    if isinstance(thing, LossEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the loss {name} is neither a class nor a LossEntry")
    missing = [method for method in _REQUIRED if not callable(getattr(thing, method, None))]
    if missing:
        raise TypeError(f"the loss {name} lacks {', '.join(missing)}")
    settings = getattr(thing, "Settings", Section)
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of the loss {name} is not a Section")
    return LossEntry(settings, lambda: thing, bool(getattr(thing, "takes_cut_vocabulary", False)))


LOSSES: Registry[LossEntry] = Registry("loss.name", "torchtitan.losses", entry_of)
LOSSES.add_built_in(
    "cross_entropy",
    LossEntry(CrossEntropySettings, lazily("torchtitan.loss.cross_entropy:CrossEntropyLoss"), True),
)


def register_loss(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss available as `name`. Its settings are its `Settings`.

    Raises ValueError for a taken name, TypeError for a class that is no loss.
    """
    return LOSSES.decorator(name)


def loss_settings(section: Loss) -> Any:
    """The settings in `[loss.args]`, checked by the model of the loss that `section` names.

    Raises ConfigError naming each setting that is unknown or unfit.
    """
    settings = LOSSES[section.name].settings
    return validated(settings, section.args, "loss.args")
