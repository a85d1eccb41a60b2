"""Parameter groups by name, torch's own optimizers, and a step that skips non-finite gradients.

There is one optimizer for each model part of this rank, or for each parameter where they step in
the backward. Groups come from `optimizer.param_groups`: globs over full parameter names, of which
the first match wins; parameters without a match form the last group. Every group carries
`lr_factor`, by which the schedule's learning rate is multiplied.

One NaN in a gradient would stay in the moments for good, and scaling the update by zero does not
help, since `0 * nan` is `nan`. So a non-finite step is skipped altogether, on the device where the
implementation can, so that the host need not wait.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan.config.errors import ConfigError
from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.registry import (
    OPTIMIZERS,
    Groups,
    SgdSettings,
    check_patterns,
    group_index,
    optimizer_settings,
)

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizers(
    section: OptimizerSection,
    model_parts: Sequence[nn.Module],
    device: torch.device,
    all_names: Iterable[str] | None = None,
) -> list[torch.optim.Optimizer]:
    """Build one optimizer per model part; with `early_step_in_backward` one per parameter.

    Only parameters that require gradients take part; a part without any gets no optimizer. A tied
    parameter counts once, under its first name. `all_names` are the parameter names of the whole
    model, needed where this rank holds only a part of it: a pattern must match one of them.

    Raises:
        ConfigError: a pattern of `optimizer.param_groups` is never the first to match a parameter.
    """
    if all_names is None:
        all_names = [name for part in model_parts for name, _ in _trained_parameters(part)]
    problems = check_patterns(section, list(all_names))
    if problems:
        raise ConfigError(problems)
    trained = [_trained_parameters(part) for part in model_parts]
    if section.early_step_in_backward:
        trained = [[pair] for pairs in trained for pair in pairs]
    return [_build_optimizer(section, pairs, device) for pairs in trained if pairs]


def step_optimizers(optimizers: Sequence[torch.optim.Optimizer], is_finite: Tensor) -> None:
    """Step every optimizer; if `is_finite` is False, change no parameter, moment or step count.

    `is_finite` is a bool scalar on the parameters' device, the same on all ranks. Fused
    implementations decide on the device; others make the host wait for `is_finite`.
    """
    for optimizer in optimizers:
        # torch sets this on optimizers that read `found_inf`: its fused ones.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # The fused kernels return at once when this is 1, weight decay and step count included.
            optimizer.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif is_finite.item():
            optimizer.step()


def _trained_parameters(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in part.named_parameters() if param.requires_grad]


def _build_optimizer(
    section: OptimizerSection,
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    device: torch.device,
) -> torch.optim.Optimizer:
    members: list[list[tuple[str, nn.Parameter]]] = [
        [] for _ in range(len(section.param_groups) + 1)
    ]
    for name, param in named_parameters:
        members[group_index(section, name)].append((name, param))

    groups: list[dict[str, Any]] = []
    for index, pairs in enumerate(members):
        if not pairs:  # torch refuses empty groups
            continue
        weight_decay, lr_factor = section.weight_decay, 1.0
        if index < len(section.param_groups):
            exception = section.param_groups[index]
            lr_factor = exception.lr_factor
            if exception.weight_decay is not None:
                weight_decay = exception.weight_decay
        group = {"weight_decay": weight_decay, "lr_factor": lr_factor}
        names, params = zip(*pairs, strict=True)
        groups.append({"params": list(params), "names": list(names), **group})

    build = OPTIMIZERS[section.name].load()
    return build(groups, section, optimizer_settings(section), device)


def build_adam(
    groups: Groups, section: OptimizerSection, settings: object, device: torch.device
) -> torch.optim.Optimizer:
    """Build Adam, whose weight decay is added to the gradient."""
    return torch.optim.Adam(groups, **adam_options(section, device))


def build_adamw(
    groups: Groups, section: OptimizerSection, settings: object, device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamW (https://arxiv.org/abs/1711.05101)."""
    return torch.optim.AdamW(groups, **adam_options(section, device))


def adam_options(section: OptimizerSection, device: torch.device) -> dict[str, Any]:
    """Return the arguments of torch's Adam and AdamW other than the groups."""
    fused = section.implementation == "fused" and device.type in FUSED_DEVICES
    return {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "fused": fused,
        "foreach": not fused and section.implementation != "for-loop",
    }


def build_sgd(
    groups: Groups, section: OptimizerSection, settings: SgdSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Build SGD, whose weight decay is added to the gradient.

    Never fused: torch has no fused step for sharded parameters.
    """
    return torch.optim.SGD(
        groups,
        lr=section.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        foreach=section.implementation != "for-loop",
    )
