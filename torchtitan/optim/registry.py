"""Optimizers by name. No torch: an optimizer's code is imported when it is used.

A third party adds one by the decorator `register_optimizer`, in a module that `job.custom_import`
names, or by an entry point of the group `torchtitan.optimizers`. Either gives a class: an optimizer
with

- `build(groups, section, settings, device)`, a class method that returns one. `groups` are torch's
  parameter groups: `params` with their `names`, `weight_decay`, and `lr_factor`, by which the loop
  multiplies the learning rate; `section` is `[optimizer]`, `settings` what `[optimizer.args]` has;
- `initial_state(parameter, group)`: what its first step would find in `state` had it made all of it
  before, as a checkpoint is loaded into a fresh optimizer. Tensors only, a step count included;
- and, as it likes, `Settings` (a `Section`), and `uses`, `not_in_backward` and `check_names` as
  below.

A step that is not finite is left out: the host waits for the gradients' norm. An optimizer that
can tell on the device, by `found_inf` as torch's fused ones, says so as they do, by
`_step_supports_amp_scaling = True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.registry import Registry, lazily
from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.config.schema import Section
from torchtitan.config.value_errors import validated
from torchtitan.optim.settings import (
    AdafactorSettings,
    AdamW8bitSettings,
    MuonSettings,
    SgdSettings,
    check_muon_names,
)

if TYPE_CHECKING:
    import torch

    Groups = list[dict[str, Any]]
    Build = Callable[[Groups, OptimizerSection, Any, torch.device], torch.optim.Optimizer]

C = TypeVar("C", bound=type)
Shapes = Mapping[str, tuple[int, ...]]
"""Of all parameters of the model, by name."""

ADAM_KEYS = ("beta1", "beta2", "eps")
OPTIONAL_KEYS = (*ADAM_KEYS, "implementation")
"""Keys of `[optimizer]` that an optimizer may have no use for."""


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer: its settings' model, and a function that imports and returns its `build`."""

    settings: type[Section]
    load: Callable[[], Build]
    uses: tuple[str, ...] = ()
    """Of `OPTIONAL_KEYS` those that it uses; others are refused."""
    not_in_backward: str = ""
    """Why it cannot step one parameter at a time, in the backward; empty if it can."""
    check_names: Callable[[Any, Shapes], list[ConfigIssue]] | None = None
    """Problems of its settings with the parameters of the model."""


def entry_of(name: str, thing: Any) -> OptimizerEntry:
    """What is registered under `name`, if it is one. Raises TypeError."""
    if isinstance(thing, OptimizerEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the optimizer {name} is neither a class nor an OptimizerEntry")
    for method in ("build", "initial_state", "step"):
        if not callable(getattr(thing, method, None)):
            raise TypeError(f"the optimizer {name} lacks {method}")
    optimizer: Any = thing
    settings, uses = getattr(thing, "Settings", Section), tuple(getattr(thing, "uses", ()))
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of the optimizer {name} is not a Section")
    if not set(uses) <= set(OPTIONAL_KEYS):
        raise TypeError(f"what the optimizer {name} uses is not all of {', '.join(OPTIONAL_KEYS)}")
    return OptimizerEntry(
        settings,
        lambda: optimizer.build,
        uses,
        getattr(thing, "not_in_backward", ""),
        getattr(thing, "check_names", None),
    )


_GATHERS = "its step adds up over ranks, and in a backward other exchanges are under way"

OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer.name", "torchtitan.optimizers", entry_of)
for _name, _entry in {
    "AdamW": OptimizerEntry(
        Section, lazily("torchtitan.optim.torch_optimizers:build_adamw"), OPTIONAL_KEYS
    ),
    "Adam": OptimizerEntry(
        Section, lazily("torchtitan.optim.torch_optimizers:build_adam"), OPTIONAL_KEYS
    ),
    "AdamWBF16": OptimizerEntry(
        Section, lazily("torchtitan.optim.low_memory_adamw:build_bf16"), ADAM_KEYS
    ),
    "AdamW8bit": OptimizerEntry(
        AdamW8bitSettings, lazily("torchtitan.optim.low_memory_adamw:build_8bit"), ADAM_KEYS
    ),
    "SGD": OptimizerEntry(
        SgdSettings,
        lazily("torchtitan.optim.torch_optimizers:build_sgd"),
        ("implementation",),
    ),
    "Adafactor": OptimizerEntry(
        AdafactorSettings,
        lazily("torchtitan.optim.adafactor:build"),
        not_in_backward=_GATHERS,
    ),
    "Muon": OptimizerEntry(
        MuonSettings,
        lazily("torchtitan.optim.muon:build"),
        OPTIONAL_KEYS,
        not_in_backward=_GATHERS,
        check_names=check_muon_names,
    ),
}.items():
    OPTIMIZERS.add_built_in(_name, _entry)


def register_optimizer(name: str) -> Callable[[C], C]:
    """Class decorator: make an optimizer available as `name`.

    Raises ValueError for a taken name, TypeError for a class that is no optimizer.
    """
    return OPTIMIZERS.decorator(name)


def optimizer_settings(section: OptimizerSection) -> Any:
    """The settings in `[optimizer.args]`, checked.

    Raises ConfigError naming each setting that is unknown or unfit.
    """
    settings = OPTIMIZERS[section.name].settings
    return validated(settings, section.args, "optimizer.args")
