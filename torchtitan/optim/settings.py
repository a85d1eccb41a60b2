"""Settings of the built-in optimizers, `[optimizer.args]`. No torch."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import Beta, Names, NonNegativeFloat, PositiveFloat, Section
from torchtitan.config.suggest import fix_of_glob


class SgdSettings(Section):
    momentum: Beta = 0.0
    """Decay of the sum of gradients that is stepped along; 0 keeps none."""

    nesterov: bool = False
    """Step along the gradient and the sum that it will be in. Needs `momentum`."""

    @field_validator("nesterov")
    @classmethod
    def _has_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("momentum", 1.0):
            raise ValueError("needs momentum above 0. Fix: set momentum = 0.9, or this to false")
        return value


class AdafactorSettings(Section):
    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    """Step t averages squared gradients with the weight t^beta2_decay of the newest."""

    eps1: PositiveFloat | None = None
    """Least root mean square of a gradient. Unset: the smallest relative step of the weights'
    type."""

    eps2: NonNegativeFloat = 1e-3
    """Least root mean square of a parameter that its step is relative to."""

    d: Annotated[float, Field(ge=1)] = 1.0
    """Updates with a larger root mean square are scaled down to it."""


class AdamW8bitSettings(Section):
    block_size: Annotated[int, Field(ge=16, le=4096)] = 256
    """Weights of a row that share a scale. Matrices whose rows are no multiple of it keep their
    moments in float32."""


class MuonSettings(Section):
    patterns: Names = ("layers.*",)
    """Globs over full parameter names: the matrices that match are orthogonalised, all else has
    AdamW."""

    momentum: Beta = 0.95
    """Decay of the average of gradients."""

    nesterov: bool = True
    """Orthogonalise what the average will be, with the newest gradient once more."""

    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Newton-Schulz iterations."""

    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """How the learning rate depends on a matrix's shape (A, B): `match_rms_adamw` times
    0.2 sqrt(max(A, B)), which lets matrices use AdamW's learning rate and weight decay; `original`
    times sqrt(max(1, A / B))."""

    lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate of the matrices."""


def is_muons(settings: MuonSettings, name: str, num_dims: int) -> bool:
    """Whether Muon orthogonalises the parameter."""
    return num_dims == 2 and any(fnmatchcase(name, glob) for glob in settings.patterns)


def check_muon_names(
    settings: MuonSettings, shapes: Mapping[str, tuple[int, ...]]
) -> list[ConfigIssue]:
    """Patterns that match no matrix."""
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
