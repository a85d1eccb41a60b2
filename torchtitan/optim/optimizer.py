"""Optimizers: parameter groups by name, and a step that a non-finite gradient cannot poison.

There is one optimizer for each model part of this rank, or for each parameter, where they step in
the backward. Groups come from `optimizer.param_groups`: globs over full parameter names, of which
the first that matches wins; what none matches forms the last group. Every group carries
`lr_factor`, by which the schedule's learning rate is multiplied.

One NaN in a gradient would stay in the moments for good, and scaling the update by zero does not
help, since `0 * nan` is `nan`. So a step that is not finite has to be left out altogether.
`step_optimizers` does that on the device where the implementation can, so that the host need not
wait to learn whether the step was finite.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan.config.errors import ConfigError
from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.param_groups import check_patterns, group_index
from torchtitan.optim.registry import OPTIMIZERS, optimizer_settings


def build_optimizers(
    section: OptimizerSection,
    model_parts: Sequence[nn.Module],
    device: torch.device,
    all_names: Iterable[str] | None = None,
) -> list[torch.optim.Optimizer]:
    """One optimizer per model part, over its parameters that require gradients, none where none
    does; with `early_step_in_backward` one per parameter.

    A tied parameter counts once, under its first name. `all_names` are the parameter names of the
    whole model, needed where this rank holds only a part of it: a pattern must match one of them.

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
    """Step every optimizer; if `is_finite` is False, leave everything as it is, bit for bit.

    `is_finite` is a bool scalar on the parameters' device, the same on all ranks. Everything means
    parameters, moments and step counters. Fused implementations decide on the device; others make
    the host wait for `is_finite`.
    """
    for optimizer in optimizers:
        # torch's own mark of those that ask for `found_inf`: its fused ones.
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
