"""`ModelHandler`: the base class of model handlers. No torch.

`model.handlers = ["float8", "compile"]` applies handlers in that order. A handler inherits from
`ModelHandler` and overrides the hooks that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.schema import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.spec import InitRule
    from torchtitan.parallel.tensor_parallel import ParallelStyle
    from torchtitan.weights.made_tensors import MadeTensors
    from torchtitan.weights.stored_model import StoredModel


class ModelHandler:
    """A change to the model, with hooks around the optimizer step. All hooks do nothing by default.

    `model` is the whole model in `check` and `convert`. Later hooks get this rank's model, or a
    list where the rank holds several pipeline stages. Stages are copies, so find modules again in
    the hook's argument instead of keeping references from `convert`.
    """

    Settings: type[Section] = Section
    """The model of `[handlers.NAME]`."""

    after: tuple[str, ...] = ()
    """Handlers that must be listed before this one where both are used."""

    excludes: tuple[str, ...] = ()
    """Handlers that cannot be combined with this one."""

    adds_adapters: bool = False
    """True if the handler trains adapters next to a base that it leaves as it is. Checkpoints of a
    run that starts from `checkpoint.initial_load_path` then leave out what is not trained, and
    refer to that path: it must not be changed afterwards."""

    start_files: tuple[Path, ...] = ()
    """Files from which `initialize_added` takes values: with the weights, the run's start."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        pass

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Return the problems that only the model shows. `model` is on the meta device."""
        return []

    def convert(self, model: nn.Module) -> None:
        """Change the model in place, before any parallelism.

        Runs under `torch.device("meta")` with `training.dtype` as the default type: new parameters
        take no memory and have the type of the existing ones.
        """

    def check_start(self, model: nn.Module) -> list[ConfigIssue]:
        """Return the problems of what `initialize_added` will read; called where that will be."""
        return []

    def init_rule(self, name: str) -> InitRule | None:
        """Return how a parameter or buffer is initialised; None leaves it to the model.

        Every name that the handler adds needs a rule.
        """
        return None

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Change the tensor-parallel styles by module name, in place, before they are applied."""

    def transform_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """Return the values to use in place of `tensor`, in the same shape.

        Called when a new run starts from the weights of a run without this handler, for this rank's
        part of each parameter and buffer.
        """
        return tensor

    def made_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, MadeTensors]:
        """Return which of the model's `tensors` are made of a plain matrix, by the matrix's name.

        A matrix that is stored in their place is loaded by slices, a few at a time, and given to
        `MadeTensors.store`, also on a resume. `tensors` are some or all of this rank's.
        """
        return {}

    def initialize_added(self, model: nn.Module | list[nn.Module]) -> None:
        """Change the first values of what the handler added, now that the model's own are in place.

        Called before `after_load` in a new run, unless it starts from a run with this handler.
        """

    def merge_added(self, name: str, weight: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the plain weight that computes what `weight` does with what the handler added.

        `added` has the added parameters of the same module by their last names, whole like
        `weight`. For handlers with `adds_adapters`, whose models are exported so.
        """
        raise NotImplementedError

    def write_added(self, folder: Path, added: Mapping[str, Tensor], base: StoredModel) -> None:
        """Write all added parameters, whole and by full name, in the format of other programs.

        For handlers with `adds_adapters`.
        """
        raise NotImplementedError

    def read_added(self, folder: Path, base: StoredModel) -> dict[str, Tensor]:
        """Return what `write_added` has written."""
        raise NotImplementedError

    def on_plain_base(self) -> AbstractContextManager[bool]:
        """Return a context in which `convert` leaves the base as `write_added`'s readers have it.

        It is entered as False if that is as always.
        """
        return nullcontext(False)

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        """React to the weights being in place, initial, loaded or resumed."""

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Run after gradient clipping and before the optimizer step.

        With `optimizer.early_step_in_backward` the weights are stepped already and there are no
        gradients.
        """

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Run after the optimizer step."""

    def without_adapters(
        self, model: nn.Module | list[nn.Module]
    ) -> AbstractContextManager[object]:
        """Return a context in which the model computes without what the handler adds to it.

        For handlers that set `adds_adapters`: DPO's reference is then the model itself.
        """
        return nullcontext()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what checkpoints store, by name; None for a handler without state.

        Tensors are live ones (DTensors are resharded), other values are plain JSON. On resume it is
        called right after `after_load`, to tell what to fill.
        """
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the stored state: the tensors of `state_dict`, filled, and the stored values."""
