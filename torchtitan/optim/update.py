"""When the optimizer's step is made: after the backward, or in it.

The loop asks the same two things of both: the norm of the step's gradients, and the step. A step in
the backward has been made by then. Each parameter is stepped by an optimizer of its own, as soon as
its gradient is reduced, and the gradient is freed: FSDP calls the parameter's hook once for each
unit's reduction, so the gradients of one unit exist at a time, instead of those of the model.

What that gives up: nobody knows the norm of all gradients before the first parameter changes. They
cannot be clipped by it, and a step that is not finite cannot be left out. The run still ends at
such a step, before anything is saved.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from torchtitan.optim.optimizer import step_optimizers
from torchtitan.parallel.grad_clip import StreamingGradNorm, gradient_norm


class Update(Protocol):
    """What the loop needs, after each backward."""

    def gradient_norm(self) -> Tensor:
        """2-norm of the step's gradients, a scalar beside the parameters, the same on all ranks.
        All ranks must call it."""

    def step(self, is_finite: Tensor) -> None:
        """Let every parameter have had its step; without clipping if it was made already."""


class AfterBackward:
    """One step of all parameters, which is left out if it is not finite."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        ranks_per_stage: int,
        uncounted: Collection[nn.Parameter] = (),
    ):
        """`ranks_per_stage`, `uncounted`: see `gradient_norm`."""
        self._parameters = parameters
        self._optimizers = optimizers
        self._ranks_per_stage = ranks_per_stage
        self._uncounted = uncounted

    def gradient_norm(self) -> Tensor:
        """See `Update`."""
        return gradient_norm(self._parameters, self._ranks_per_stage, self._uncounted)

    def step(self, is_finite: Tensor) -> None:
        """See `Update`."""
        step_optimizers(self._optimizers, is_finite)


class OptimizerInBackward:
    """A step of each parameter when its gradient is there. Learning rates have to be set before the
    backward."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        ranks_per_stage: int,
        wait_for_staging: Callable[[], None],
        any_parameter: nn.Parameter,
        late: Collection[nn.Parameter] = (),
        uncounted: Collection[nn.Parameter] = (),
    ):
        """`optimizers` of one parameter each, none if all that this rank has is frozen;
        `any_parameter` of this rank's. `wait_for_staging` is called before one changes. `late`:
        parameters whose gradient is complete after the backward only, such as tied weights of a
        pipeline; `uncounted`: see `gradient_norm`."""
        parameters = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
        self._norm = StreamingGradNorm(ranks_per_stage, any_parameter.device, any_parameter.dtype)
        self._before_change = wait_for_staging
        self._optimizers = optimizers
        # Python's collector does not see hooks of parameters: what they held would never be freed.
        alive = weakref.ref(self)
        self._late: list[tuple[int, nn.Parameter]] = []
        self._uncounted = set(uncounted)
        for index, parameter in enumerate(parameters):
            if parameter in set(late):
                self._late.append((index, parameter))
            else:
                parameter.register_post_accumulate_grad_hook(partial(_step, alive, index))

    def gradient_norm(self) -> Tensor:
        """See `Update`."""
        for index, parameter in self._late:
            self.step_one(index, parameter)
        return self._norm.take()

    def step(self, is_finite: Tensor) -> None:
        """Nothing is left to do."""

    def step_one(self, index: int, parameter: nn.Parameter) -> None:
        """Step one parameter, in the backward on the CUDA stream that has reduced its gradient."""
        assert parameter.grad is not None
        _await_offloaded(parameter.grad)
        if parameter not in self._uncounted:
            self._norm.add(index, parameter.grad)
        self._before_change()
        self._optimizers[index].step()
        parameter.grad = None


def _step(alive: "weakref.ref[OptimizerInBackward]", index: int, parameter: nn.Parameter) -> None:
    update = alive()
    assert update is not None, "nobody holds what steps the parameters"
    update.step_one(index, parameter)


def _await_offloaded(gradient: Tensor) -> None:
    """Wait for a gradient that is on its way to host memory: some versions of FSDP call hooks
    before it has arrived. CUDA only, not run by any test here."""
    if not gradient.is_cuda and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
