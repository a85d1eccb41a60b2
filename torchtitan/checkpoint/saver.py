"""`Saver`: when to save and what a checkpoint holds, for the training loop.

Without checkpointing it does nothing, so that the loop need not ask. A checkpoint holds the model,
the optimizer state, what handlers keep, and, as JSON in its manifest, where the run stands: step,
tokens seen, and the place of every data lane, whichever rank serves it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.checkpointer import Checkpointer, Found
from torchtitan.checkpoint.data_check import data_problems
from torchtitan.checkpoint.handler_state import HandlerState, KeepsState, load_handler_state
from torchtitan.checkpoint.initial_load import ChangesWeights, InitialLoad
from torchtitan.checkpoint.manifest import HANDLERS_STATE, OPTIMIZER_PREFIX, select_tensors
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config import CheckpointError, NonFiniteError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.finiteness import non_finite_on_any_rank, some_of
from torchtitan.utils.dtypes import torch_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step."""

    step: int = 0
    num_tokens_seen: int = 0
    lane_states: Mapping[str, dict[str, Any]] | None = None
    """Of all lanes, by number; None at the start of the data."""
    data_fingerprint: str | None = None
    data_summary: Mapping[str, Any] | None = None
    """What the fingerprint is of, to say what differs."""


class Saver:
    """Saves at intervals and at the end; finds what to start from. All ranks call every method.

    As a context it does not end before what is being saved is.
    """

    def __init__(
        self, section: Checkpoint, checkpointer: Checkpointer | None, world: DistributedContext
    ):
        self._section = section
        self._checkpointer = checkpointer
        self._world = world
        self._last_saved = -1
        self._found: Found | None = None
        self._initial: InitialLoad | None = None
        if checkpointer is not None:
            self._found = checkpointer.find(section.load_step)
            if self._found is not None:
                self._last_saved = checkpointer.saved_step = self._found.step
            elif section.initial_load_path is not None:
                self._initial = InitialLoad(section, world)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the run ends with its first error

    @property
    def loads(self) -> bool:
        """Whether there are weights to start from, so that no others are needed."""
        return self._found is not None or self._initial is not None

    @property
    def state(self) -> RunState:
        """Where the run stands in what it starts from; the start without such."""
        stored: Mapping[str, Any] = {}
        if self._found is not None:
            stored = self._found.state
        elif self._initial is not None:
            stored = self._initial.state
        names = {field.name for field in fields(RunState)}
        return RunState(**{key: value for key, value in stored.items() if key in names})

    @property
    def saved_step(self) -> int:
        """The last step that is sure to be saved in the run folder; 0 without one."""
        return 0 if self._checkpointer is None else max(0, self._checkpointer.saved_step)

    def load(
        self,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        handlers: Sequence[ChangesWeights] = (),
    ) -> None:
        """Load in place what there is to start from: the model, and optimizer state where that is
        to come along. `handlers` may change plain weights of another run, see `InitialLoad.load`.
        Raises `ConfigError` when there is no room for the next checkpoint, `NonFiniteError` for
        weights or optimizer state that are not finite."""
        if self._checkpointer is None:
            return
        model = model_tensors(model_parts)
        optimizer = optimizer_tensors(model_parts, optimizers)
        if not self._section.load_only:
            self._checkpointer.require_space(model | optimizer)
        if self._initial is not None:
            self._initial.load(model, optimizer, handlers)
            self._require_finite_start(
                self._section.initial_load_path, model | optimizer, model_parts
            )
        if self._found is None:
            return
        is_seed = self._found.model_only and self._found.step == 0
        found = replace(
            self._found, manifest=select_tensors(self._found.manifest, of_handlers=False)
        )
        self._checkpointer.load(found, model if is_seed else model | optimizer)
        self._require_finite_start(self._found.path, model | optimizer, model_parts)
        logger.info("Resumed from step %d (%s).", self._found.step, self._found.path)

    def load_handlers(
        self,
        handlers: Sequence[KeepsState],
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Give handlers the state that was saved of them, after their `after_load`. Raises what
        `load_handler_state` raises, and what a save would for a state that cannot be stored."""
        if self._checkpointer is None:
            return
        state = HandlerState(handlers)
        if state.kept and not self._section.load_only:
            state.agreed_values(self._world)
            whole = model_tensors(model_parts) | optimizer_tensors(model_parts, optimizers)
            self._checkpointer.require_space(whole | state.tensors())
        found = self._found
        if found is not None and not found.model_only:
            load_handler_state(self._world, found.path, found.manifest, handlers)
        elif found is None and self._initial is not None and self._initial.whole_run is not None:
            load_handler_state(self._world, *self._initial.whole_run, handlers)

    def begin(self) -> None:
        """Move aside the steps that the run leaves behind. Before the first step is trained, when
        nothing can refuse the start any more."""
        if self._checkpointer is not None:
            self._checkpointer.begin()

    def check_data(
        self, fingerprint: str, differences: Callable[[Mapping[str, Any] | None], Mapping[str, str]]
    ) -> None:
        """Refuse to go on with other data than those of the checkpoint, unless that is allowed.
        `differences` compares a stored summary: config key -> how it differs."""
        problems = data_problems(self._section, asdict(self.state), fingerprint, differences)
        if problems:
            raise CheckpointError("; ".join(map(str, problems)))

    def is_due(self, step: int, last: bool) -> bool:
        """Whether `step` is to be saved: each interval, the `last` one, and the first if asked."""
        if self._checkpointer is None or self._section.load_only or step == self._last_saved:
            return False
        first = self._section.enable_first_step_checkpoint and step == 1
        return last or first or step % self._section.interval == 0

    def save(
        self,
        state: RunState,
        lane_states: Mapping[int, dict[str, Any]],
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        finished: bool,
        last: bool,
        handlers: Sequence[KeepsState] = (),
    ) -> None:
        """Save a checkpoint; it is sure to be there when `saved_step` says so.

        `lane_states`: those of this rank; `finished`: the run is over; `last`: this job is, so that
        the save need not go on beside training. Raises what went wrong with the save before, and
        `NonFiniteError` where weights or optimizer state are not finite, with nothing saved; and
        the errors of `HandlerState.agreed_values`.
        """
        assert self._checkpointer is not None
        self.wait()
        lanes: dict[str, dict[str, Any]] = {}
        for part in self._world.gather_json({str(k): v for k, v in lane_states.items()}):
            lanes.update(part)
        model_only = finished and self._section.last_save_model_only
        tensors = model_tensors(model_parts)
        kept = HandlerState(() if model_only else handlers)
        if model_only:
            tensors = self._exported(tensors)
        else:
            tensors |= optimizer_tensors(model_parts, optimizers)
        self._require_finite(state.step, tensors, model_parts)
        tensors |= kept.tensors()
        ordered = dict(sorted(lanes.items(), key=_number))
        whole = asdict(replace(state, lane_states=ordered)) | {"finished": finished}
        whole[HANDLERS_STATE] = kept.agreed_values(self._world)
        self._checkpointer.save(state.step, tensors, whole, model_only, blocking=last)
        self._last_saved = state.step
        if kept.tensors() or any(True for part in model_parts for _ in part.buffers()):
            self.wait_for_staging()  # a forward may change them

    def save_seed(self, model_parts: Sequence[nn.Module]) -> None:
        """Save the initial weights as step 0."""
        assert self._checkpointer is not None
        tensors = model_tensors(model_parts)
        self._checkpointer.require_space(tensors)
        self._require_finite(0, tensors, model_parts)
        self._checkpointer.save(0, tensors, asdict(RunState()), model_only=True, blocking=True)

    def wait_for_staging(self) -> None:
        """To be called before parameters and optimizer state change: copies may be under way."""
        if self._checkpointer is not None:
            self._checkpointer.wait_for_staging()

    def save_failed(self) -> bool:
        """Whether this rank knows that what was being saved is not."""
        return self._checkpointer is not None and self._checkpointer.save_failed

    def wait(self) -> None:
        """Return when nothing is being saved. Raises `CheckpointError` when the save has failed, on
        all ranks."""
        if self._checkpointer is not None:
            self._checkpointer.wait()

    def raise_failure(self) -> None:
        """To be called on all ranks when a rank says `save_failed`: raises `CheckpointError`."""
        self.wait()
        raise CheckpointError("a checkpoint was not saved; the log of another rank says why")

    def describe_newest(self) -> str:
        """Say which checkpoint the same command would go on from. All ranks must call it."""
        try:
            self.wait()
        except CheckpointError as failure:
            logger.error("%s", failure)
        if self._checkpointer is None or self._section.load_only:
            return "Nothing of this run is saved"
        if self._checkpointer.saved_step < 0:
            return "No checkpoint of this run is saved: the same command begins anew"
        return (
            f"The newest checkpoint is step {self._checkpointer.saved_step}, which was found to be"
            " finite: the same command goes on from it"
        )

    def _require_finite(
        self, step: int, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> None:
        names = self._non_finite(tensors, parts)
        if not names:
            return
        cause = "Lower optimizer.lr, lengthen the warmup, or look at the handlers' hooks"
        if step == 0:
            cause = "Look at the model's init_rule, and at its handlers"
        raise NonFiniteError(
            f"step {step} is not saved, since these hold NaN or infinity: {some_of(names)}."
            f" {cause}. {self.describe_newest()}"
        )

    def _require_finite_start(
        self, path: object, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> None:
        """Refuse what was loaded unless it is finite; a step of this run is moved aside."""
        names = self._non_finite(tensors, parts)
        if not names:
            return
        fault = f"{path} cannot be trained: these hold NaN or infinity: {some_of(names)}"
        if self._found is None:
            raise NonFiniteError(f"{fault}. Set checkpoint.initial_load_path to other weights")
        if self._section.load_step >= 0:
            raise NonFiniteError(f"{fault}. Choose an earlier step with checkpoint.load_step")
        assert self._checkpointer is not None
        self._checkpointer.quarantine(self._found, fault)
        raise NonFiniteError(
            f"{fault}. It is moved aside: the same command goes on from the step before, if any"
        )

    def _non_finite(
        self, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> list[str]:
        """Names of parameters and optimizer state that hold NaN or infinity, and of what else is
        saved and holds NaN: a buffer may be infinite, as masks are."""
        parameters = {name for part in parts for name, _ in part.named_parameters()}
        others = {
            name
            for name in tensors
            if name not in parameters and not name.startswith(OPTIMIZER_PREFIX)
        }
        return non_finite_on_any_rank(self._world, tensors, others)

    def _exported(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors in `checkpoint.export_dtype`, if that can hold them."""
        if self._section.export_dtype == "float32":
            return dict(tensors)
        dtype = torch_dtype(self._section.export_dtype)
        exported = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        before, after = (non_finite_on_any_rank(self._world, of) for of in (tensors, exported))
        overflown = [name for name in after if name not in before]
        if not overflown:
            return exported
        logger.error(
            "checkpoint.export_dtype = %s cannot hold all values of %s: the weights are saved in"
            " their own type",
            self._section.export_dtype,
            some_of(overflown),
        )
        return dict(tensors)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])
