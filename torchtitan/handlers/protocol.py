"""`ModelHandler`: what a handler is, and what it may have beside. No torch.

`model.handlers = ["float8", "compile"]` applies handlers in that order. Some members are optional,
and found by their presence, so that no other part of the library has to know any handler by name:

- `after`: names of handlers that must come before it, where both are used;
- `excludes`: names of handlers that it cannot be combined with;
- `check(model)`: problems that only the model can tell, before anything starts, on the meta device;
- `init_rule(name)`: how a parameter or buffer starts, as a `torchtitan.models.spec.InitRule`; None
  leaves it to the model. Must answer for every name that the handler adds;
- `transform_loaded(name, tensor)`: a new run starts from plain weights, those of a checkpoint whose
  run did not have this handler. `tensor` is the part of a parameter or buffer that this rank holds;
  what is returned, of the same shape, takes its place;
- `after_load(model)`: once the weights are there, initial ones or those of a checkpoint;
- `state_dict()` and `load_state_dict(state)`: what it keeps from step to step, for checkpoints.
  The first returns live tensors (DTensors are resharded) and plain values by name, also right
  after `after_load`; the second is called next, where a checkpoint is resumed from: with the same
  tensors, filled, and the values that were saved;
- `extend_tp_plan(plan)`: before tensor parallelism cuts the model, or a stage of it, to change the
  styles, by name, in place (`torchtitan.parallel.tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext

if TYPE_CHECKING:
    from torch import nn

    from torchtitan.distributed.parallel_dims import ParallelDims


Check = Callable[[RunContext, Any], Iterable[ConfigIssue]]
"""What is wrong with the settings of a handler that is used."""


def no_problems(context: RunContext, settings: Any) -> Iterable[ConfigIssue]:
    """Nothing can be wrong."""
    return ()


@runtime_checkable
class ModelHandler(Protocol):
    """A change to the model, with a say around the optimizer."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims): ...

    def convert(self, model: nn.Module) -> None:
        """Change the model, which is on the meta device, whole, before any parallelism.

        Called under `torch.device("meta")` with `training.dtype` as the default type: new modules
        and parameters take no memory and have the type of the others.

        Stages of a pipeline are made of copies of it later: find modules again in what a hook is
        given, rather than remember them from here.
        """

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """After the gradients are clipped, before the optimizer's step. `model` is a list where
        this rank has several stages of a pipeline. With `optimizer.early_step_in_backward` the
        steps have been made by then, and there are no gradients."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """After the optimizer's step."""
