"""The optimizer step, after the backward or in it.

The loop asks both kinds for the gradient norm and for the step. In the backward, each parameter has
an optimizer of its own that steps as soon as the gradient is reduced, and the gradient is freed:
only the gradients of one FSDP unit exist at a time.

The price: the norm of all gradients is not known before the first parameter changes. Gradients
cannot be clipped, and a non-finite step cannot be skipped. The run still ends at such a step,
before anything is saved.
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
    """The optimizer step as the training loop uses it after each backward."""

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the step's gradients, a scalar that is the same on all ranks.

        Collective. The scalar is on the parameters' device.
        """

    def step(self, is_finite: Tensor) -> None:
        """Step every parameter that has not been stepped in the backward."""


class AfterBackward:
    """Steps all parameters at once; skips a step that is not finite."""

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
        """Return the norm; see `Update`."""
        return gradient_norm(self._parameters, self._ranks_per_stage, self._uncounted)

    def step(self, is_finite: Tensor) -> None:
        """Step all parameters if `is_finite`."""
        step_optimizers(self._optimizers, is_finite)


class OptimizerInBackward:
    """Steps each parameter when its gradient is ready. Set learning rates before the backward."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        ranks_per_stage: int,
        wait_for_staging: Callable[[], None],
        any_parameter: nn.Parameter,
        late: Collection[nn.Parameter] = (),
        uncounted: Collection[nn.Parameter] = (),
    ):
        """Register the hooks of the parameters.

        Args:
            optimizers: one for each trained parameter of this rank; may be empty.
            ranks_per_stage: see `parallel.grad_clip.gradient_norm`.
            wait_for_staging: called before a parameter changes.
            any_parameter: any parameter of this rank.
            late: parameters whose gradient is complete only after the backward, such as tied
                weights of a pipeline.
            uncounted: see `parallel.grad_clip.gradient_norm`.
        """
        parameters = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
        self._norm = StreamingGradNorm(ranks_per_stage, any_parameter.device, any_parameter.dtype)
        self._before_change = wait_for_staging
        self._optimizers = optimizers
        # The garbage collector does not see hooks of parameters: a strong reference would leak.
        alive = weakref.ref(self)
        self._late: list[tuple[int, nn.Parameter]] = []
        self._uncounted = set(uncounted)
        for index, parameter in enumerate(parameters):
            if parameter in set(late):
                self._late.append((index, parameter))
            else:
                parameter.register_post_accumulate_grad_hook(partial(_step, alive, index))

    def gradient_norm(self) -> Tensor:
        """Step the late parameters and return the norm; see `Update`."""
        for index, parameter in self._late:
            self.step_one(index, parameter)
        return self._norm.take()

    def step(self, is_finite: Tensor) -> None:
        """Do nothing: the parameters have been stepped."""

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
    assert update is not None, "the update was freed while its hooks are registered"
    update.step_one(index, parameter)


def _await_offloaded(gradient: Tensor) -> None:
    """Wait for a gradient on its way to host memory. CUDA only, not run by any test here.

    Some versions of FSDP call hooks before it has arrived.
    """
    if not gradient.is_cuda and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
