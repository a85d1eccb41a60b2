"""Optimizers by name, settings of the built-in ones, parameter groups. No torch.

The code of an optimizer is imported when it is used.

A third party adds one by the decorator `register_optimizer`, in a module that `job.custom_import`
names, or by an entry point of the group `torchtitan.optimizers`. Either gives an optimizer class
with

- `build(groups, section, settings, device)`, a class method that returns one. `groups` are torch's
  parameter groups: `params` with their `names`, `weight_decay`, and `lr_factor`, by which the loop
  multiplies the learning rate; `section` is `[optimizer]`, `settings` what `[optimizer.args]` has;
- `initial_state(parameter, group)`: the state that its first step would start from; a checkpoint is
  loaded into it. Tensors only, a step count included;
- optionally `Settings` (a `Section`), and `uses`, `not_in_backward` and `check_names` as in
  `OptimizerEntry`.

A step that is not finite is skipped, for which the host waits for the gradient norm. An optimizer
that decides on the device, by `found_inf` like torch's fused ones, declares it as they do, by
`_step_supports_amp_scaling = True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.registry import Registry, lazily, settings_of, validated
from torchtitan.config.schema import Beta, Names, NonNegativeFloat, PositiveFloat, Section
from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.config.suggest import fix_of_glob

if TYPE_CHECKING:
    import torch

C = TypeVar("C", bound=type)
Groups = list[dict[str, Any]]
"""torch's parameter groups."""
Build = Callable[[Groups, OptimizerSection, Any, "torch.device"], "torch.optim.Optimizer"]
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of all parameters of the model, by name."""

_DEFAULT_GROUPS = OptimizerSection.model_fields["param_groups"].default
ADAM_KEYS = ("beta1", "beta2", "eps")
OPTIONAL_KEYS = (*ADAM_KEYS, "implementation")
"""Keys of `[optimizer]` that not every optimizer uses."""


class SgdSettings(Section):
    """Settings of `SGD`."""

    momentum: Beta = 0.0
    """Decay of the sum of gradients that is stepped along; 0 keeps no sum."""

    nesterov: bool = False
    """Use Nesterov momentum. Needs `momentum`."""

    @field_validator("nesterov")
    @classmethod
    def _has_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("momentum", 1.0):
            raise ValueError("needs momentum above 0. Fix: set momentum = 0.9, or this to false")
        return value


class AdafactorSettings(Section):
    """Settings of `Adafactor`."""

    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    """In the average of squared gradients, step t has the weight t^beta2_decay."""

    eps1: PositiveFloat | None = None
    """Smallest root mean square of a gradient. Unset: the machine epsilon of the weights' type."""

    eps2: NonNegativeFloat = 1e-3
    """Smallest root mean square of a parameter; steps are relative to it."""

    d: Annotated[float, Field(ge=1)] = 1.0
    """Updates with a larger root mean square are scaled down to it."""


class AdamW8bitSettings(Section):
    """Settings of `AdamW8bit`."""

    block_size: Annotated[int, Field(ge=16, le=4096)] = 256
    """Weights of a row that share a scale. Matrices whose rows are not a multiple of it keep their
    moments in float32."""


class MuonSettings(Section):
    """Settings of `Muon`."""

    patterns: Names = ("layers.*",)
    """Globs over full parameter names: matrices that match are orthogonalised, all else uses
    AdamW."""

    momentum: Beta = 0.95
    """Decay of the average of gradients."""

    nesterov: bool = True
    """Use Nesterov momentum."""

    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Newton-Schulz iterations."""

    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Rule by which the learning rate depends on a matrix's shape (A, B): `match_rms_adamw` times
    0.2 sqrt(max(A, B)), which lets matrices use AdamW's learning rate and weight decay; `original`
    times sqrt(max(1, A / B))."""

    lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate of the matrices."""


def is_orthogonalised(settings: MuonSettings, name: str, num_dims: int) -> bool:
    """Return True if Muon orthogonalises the parameter."""
    return num_dims == 2 and any(fnmatchcase(name, glob) for glob in settings.patterns)


def check_muon_names(settings: MuonSettings, shapes: Shapes) -> list[ConfigIssue]:
    """Find patterns that match no matrix."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    problems = []
    if not settings.patterns:
        problem = "no matrix would be orthogonalised"
        fix = 'list some, or leave it out; AdamW alone is optimizer.name = "AdamW"'
        problems.append(ConfigIssue("optimizer.args.patterns", problem, fix, value=[]))
    for index, glob in enumerate(settings.patterns):
        if not any(fnmatchcase(name, glob) for name in matrices):
            fix = fix_of_glob(glob, matrices)
            key = f"optimizer.args.patterns[{index}]"
            problems.append(ConfigIssue(key, "it matches no matrix of the model", fix, value=glob))
    return problems


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer: its settings model, and a function that imports and returns its `build`."""

    settings: type[Section]
    load: Callable[[], Build]
    uses: tuple[str, ...] = ()
    """The `OPTIONAL_KEYS` that it uses; a warning names others that are set."""
    not_in_backward: str = ""
    """Reason that it cannot step one parameter at a time, in the backward; empty if it can."""
    check_names: Callable[[Any, Shapes], list[ConfigIssue]] | None = None
    """Finds problems of its settings with the parameters of the model."""


def entry_of(name: str, thing: Any) -> OptimizerEntry:
    """Return the entry of what is registered under `name`. Raises TypeError for anything else."""
    if isinstance(thing, OptimizerEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the optimizer {name} is neither a class nor an OptimizerEntry")
    for method in ("build", "initial_state", "step"):
        if not callable(getattr(thing, method, None)):
            raise TypeError(f"the optimizer {name} lacks {method}")
    optimizer: Any = thing
    settings, uses = settings_of(thing, f"the optimizer {name}"), tuple(getattr(thing, "uses", ()))
    if not set(uses) <= set(OPTIONAL_KEYS):
        raise TypeError(f"what the optimizer {name} uses is not all of {', '.join(OPTIONAL_KEYS)}")
    return OptimizerEntry(
        settings,
        lambda: optimizer.build,
        uses,
        getattr(thing, "not_in_backward", ""),
        getattr(thing, "check_names", None),
    )


_GATHERS = "its step communicates, and so does the backward"

OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer.name", "torchtitan.optimizers", entry_of)
for _name, _entry in {
    "AdamW": OptimizerEntry(
        Section, lazily("torchtitan.optim.optimizer:build_adamw"), OPTIONAL_KEYS
    ),
    "Adam": OptimizerEntry(Section, lazily("torchtitan.optim.optimizer:build_adam"), OPTIONAL_KEYS),
    "AdamWBF16": OptimizerEntry(
        Section, lazily("torchtitan.optim.low_memory_adamw:build_bf16"), ADAM_KEYS
    ),
    "AdamW8bit": OptimizerEntry(
        AdamW8bitSettings, lazily("torchtitan.optim.low_memory_adamw:build_8bit"), ADAM_KEYS
    ),
    "SGD": OptimizerEntry(
        SgdSettings,
        lazily("torchtitan.optim.optimizer:build_sgd"),
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
    """Decorate a class to make it available as the optimizer `name`.

    Raises ValueError for a taken name, TypeError for a class that is not an optimizer.
    """
    return OPTIMIZERS.decorator(name)


def optimizer_settings(section: OptimizerSection) -> Any:
    """Return the checked settings of `[optimizer.args]`.

    Raises ConfigError naming each unknown or invalid setting.
    """
    settings = OPTIMIZERS[section.name].settings
    return validated(settings, section.args, "optimizer.args")


def group_index(section: OptimizerSection, name: str) -> int:
    """Return the index of the first group that matches the parameter; their number if none does."""
    for index, group in enumerate(section.param_groups):
        if fnmatchcase(name, group.pattern):
            return index
    return len(section.param_groups)


def check_patterns(section: OptimizerSection, names: Sequence[str]) -> list[ConfigIssue]:
    """Find groups of `optimizer.param_groups` that no parameter of the model falls into.

    Those of the default may be empty: not every model has norms with weights.
    """
    used = {group_index(section, name) for name in names}
    problems = []
    for index, group in enumerate(section.param_groups):
        if index in used:
            continue
        matches = [name for name in names if fnmatchcase(name, group.pattern)]
        if matches:
            problem = f"earlier patterns already take all it matches, such as {matches[0]}"
            fix = "list the narrower pattern first, or remove this group"
        elif group in _DEFAULT_GROUPS:
            continue
        else:
            problem = "it matches no parameter of the model"
            fix = f"use a glob over full names such as {names[0]}, or remove this group"
        key = f"optimizer.param_groups[{index}].pattern"
        problems.append(ConfigIssue(key, problem, fix, value=group.pattern))
    return problems
