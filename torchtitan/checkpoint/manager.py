"""`CheckpointManager`: when to save, what a checkpoint holds, and which one a run continues from.

A checkpoint holds the model, the optimizer state, what handlers keep, and, as JSON in its manifest,
the step, the tokens seen, and the position of every data lane, whichever rank reads it. Without
checkpointing the methods do nothing, so that the training loop need not ask.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.base import without_base
from torchtitan.checkpoint.base_place import MovedBase
from torchtitan.checkpoint.collective import run_on_rank0
from torchtitan.checkpoint.handler_state import HandlerState, KeepsState, load_handler_state
from torchtitan.checkpoint.initial_load import ChangesWeights, InitialLoad, added_to_base, open_base
from torchtitan.checkpoint.manifest import (
    BASE_STATE,
    HANDLERS_STATE,
    InvalidCheckpoint,
    RunState,
    select_tensors,
)
from torchtitan.checkpoint.state import (
    exported_tensors,
    fill_copies,
    model_tensors,
    non_finite_tensors,
    optimizer_tensors,
)
from torchtitan.checkpoint.steps_folder import (
    inspect_step,
    move_aside,
    quarantine,
    step_folders,
    step_name,
)
from torchtitan.checkpoint.store import CheckpointStore, VerifiedStep
from torchtitan.checkpoint.stored_run import data_problems
from torchtitan.config import CheckpointError, NonFiniteError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.utils.text import some_of
from torchtitan.weights.source import WeightSource

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves at intervals and at the end, and loads what a run starts from.

    All ranks call every method. Leaving it as a context waits for the save under way. Constructing
    it chooses the step to continue from: `checkpoint.load_step`, or the newest good one; none if
    the run `replaces_run`, because the steps in the folder are the old run's. `open_foreign`: see
    `InitialLoad`.
    """

    def __init__(
        self,
        section: Checkpoint,
        store: CheckpointStore | None,
        world: DistributedContext,
        replaces_run: bool = False,
        open_foreign: Callable[[Path], WeightSource] | None = None,
    ):
        self._section, self._store, self._world = section, store, world
        self._last_saved = -1
        self._damaged: dict[int, str] = {}
        self.found: VerifiedStep | None = None
        """The step of this run to continue from."""
        self._initial: InitialLoad | None = None
        self._base: InitialLoad | None = None
        """The weights that checkpoints of this run refer to; None if they are whole."""
        self._added: frozenset[str] = frozenset()
        """Names that handlers added to the model: no base has them."""
        if store is None:
            return
        self.found = None if replaces_run else self._find(store)
        if self.found is not None:
            self._last_saved = store.saved_step = store.protected_step = self.found.step
            moved = MovedBase("checkpoint.initial_load_path", section.initial_load_path)
            self._base = open_base(section, self.found.manifest, world, open_foreign, moved)
        elif section.initial_load_path is not None:
            self._initial = InitialLoad(section, world, open_foreign)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            return  # the process leaves without waiting: what is not renamed yet does not exist
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the run ends with its first error

    # --- which step a run continues from --------------------------------------------------------

    def _find(self, store: CheckpointStore) -> VerifiedStep | None:
        """Return the step to continue from, or None if there is no `step-N` folder at all.

        Changes nothing: `begin` moves damaged and later steps aside. Raises `CheckpointError` if
        steps are there and none is good, if `checkpoint.load_step` is missing or damaged, or if a
        step is another run's.
        """
        what = f"no checkpoint in {store.folder} can be used"
        for step in run_on_rank0(self._world, what, lambda: self._candidates(store)):
            found, fault = store.verify(step)
            if found is not None:
                return found
            self._damaged[step] = fault
        if not self._damaged:
            return None
        raise CheckpointError(
            f"{what}: {'; '.join(self._damaged.values())}. Nothing was overwritten. Restore one of"
            " them, choose another with checkpoint.load_step, or start anew in another"
            " job.dump_folder or with job.new_run"
        )

    def _candidates(self, store: CheckpointStore) -> list[int]:
        """Return rank 0's list of steps to try, newest first."""
        steps, load_step = step_folders(store.folder), self._section.load_step
        for step in steps:
            manifest = inspect_step(store.folder, step).manifest
            if manifest is not None and manifest.run_id != store.run_id:
                raise InvalidCheckpoint(
                    f"{step_name(step)} is of run {manifest.run_id}, this is run {store.run_id}"
                )
        if load_step < 0:
            return steps[::-1]
        if load_step not in steps:
            raise InvalidCheckpoint(f"there is no {step_name(load_step)}, only steps {steps}")
        if steps[-1] > load_step and not self._section.allow_rewind:
            raise InvalidCheckpoint(
                f"{step_name(steps[-1])} is later than checkpoint.load_step = {load_step}; set"
                " checkpoint.allow_rewind to move later steps aside"
            )
        return [load_step]

    @property
    def loads(self) -> bool:
        """Return whether there are weights to start from, so that none need be initialised."""
        return self.found is not None or self._initial is not None

    @property
    def state(self) -> RunState:
        """Return the state in the checkpoint that the run starts from, or the defaults."""
        stored: Mapping[str, Any] = {}
        if self.found is not None:
            stored = self.found.manifest.state
        elif self._initial is not None:
            stored = self._initial.state
        names = {field.name for field in fields(RunState)}
        return RunState(**{key: value for key, value in stored.items() if key in names})

    def check_data(
        self, fingerprint: str, differences: Callable[[Mapping[str, Any] | None], Mapping[str, str]]
    ) -> None:
        """Raise `CheckpointError` if the data differ from those of the checkpoint.

        `differences` compares a stored summary with the data: config key -> what differs.
        """
        problems = data_problems(self._section, asdict(self.state), fingerprint, differences)
        if problems:
            raise CheckpointError("; ".join(map(str, problems)))

    def load(
        self,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        handlers: Sequence[ChangesWeights] = (),
    ) -> None:
        """Load the model in place, and the optimizer state unless only weights are taken.

        `handlers` may change weights of another run, see `InitialLoad.load`. Raises `ConfigError`
        if there is no room for the next checkpoint, `NonFiniteError` for weights or optimizer state
        that are not finite.
        """
        if self._store is None:
            return
        model = model_tensors(model_parts)
        optimizer = optimizer_tensors(model_parts, optimizers)
        if self._initial is not None and any(handler.adds_adapters for handler in handlers):
            self._base = self._initial
        self._added = added_to_base(model, handlers)
        own = self._own(model, model_parts)
        if not self._section.load_only:
            self._store.require_space(own | optimizer)
        if self._initial is not None:
            self._initial.load(model, optimizer, handlers)
            fill_copies(model_parts, optimizers)
            self._require_finite_start(
                self._section.initial_load_path, model | optimizer, model_parts
            )
        if self.found is None:
            return
        manifest = self.found.manifest
        is_seed = manifest.model_only and self.found.step == 0
        found = replace(self.found, manifest=select_tensors(manifest, of_handlers=False))
        if self._base is not None:
            self._base.load(model, {}, handlers, elsewhere=manifest.tensors)
        self._store.load(found, own if is_seed else own | optimizer)
        fill_copies(model_parts, optimizers)
        self._require_finite_start(self.found.path, model | optimizer, model_parts)
        logger.info("Resumed from step %d (%s).", self.found.step, self.found.path)

    def _own(
        self, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that checkpoints hold: all, or those not of the base."""
        return dict(tensors) if self._base is None else without_base(tensors, parts, self._added)

    def has_loaded_added(self, handler: ChangesWeights) -> bool:
        """Return whether what the handler added to the model had values in the checkpoint."""
        if self.found is not None:
            return True
        return self._initial is not None and self._initial.holds_any(handler.added)

    def load_handlers(
        self,
        handlers: Sequence[KeepsState],
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Give handlers their saved state, after their `after_load`.

        Raises what `load_handler_state` raises, and what a save would raise for a state that cannot
        be stored.
        """
        if self._store is None:
            return
        state = HandlerState(handlers)
        if state.kept and not self._section.load_only:
            state.agreed_values(self._world)
            own = self._own(model_tensors(model_parts), model_parts)
            own |= optimizer_tensors(model_parts, optimizers)
            self._store.require_space(own | state.tensors())
        found = self.found
        if found is not None and not found.manifest.model_only:
            load_handler_state(self._world, found.path, found.manifest, handlers)
        elif found is None and self._initial is not None and self._initial.whole_run is not None:
            load_handler_state(self._world, *self._initial.whole_run, handlers)

    def begin(self) -> None:
        """Move damaged steps (`quarantine-...`) and later ones (`rewound-...`) aside.

        Called right before the first step is trained, when nothing can refuse the start any more.
        """
        store = self._store
        if store is None:
            return

        def move() -> None:
            for step, fault in self._damaged.items():
                quarantine(store.folder, step, fault)
            for later in step_folders(store.folder) if self.found is not None else ():
                if later > store.protected_step and later not in self._damaged:
                    moved = move_aside(store.folder, later, "rewound")
                    text = "Going back to step %d: step %d is now %s."
                    logger.warning(text, store.protected_step, later, moved)

        run_on_rank0(self._world, f"{store.folder} cannot be changed", move)

    # --- when to save, and what -----------------------------------------------------------------

    @property
    def saved_step(self) -> int:
        """Return the last step known to be committed in the run folder; 0 without one."""
        return 0 if self._store is None else max(0, self._store.saved_step)

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to save `step`: at each interval, the `last`, and the first if asked."""
        if self._store is None or self._section.load_only or step == self._last_saved:
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
        """Save a checkpoint; `saved_step` says when it is committed.

        `lane_states`: this rank's; `finished`: the run is over; `last`: this job is, so the save
        is not asynchronous. Raises the error of an earlier save, `NonFiniteError` (with nothing
        saved) if weights or optimizer state are not finite, and the errors of
        `HandlerState.agreed_values`.
        """
        assert self._store is not None
        self.wait()
        lanes: dict[str, dict[str, Any]] = {}
        for part in self._world.gather_json({str(k): v for k, v in lane_states.items()}):
            lanes.update(part)
        model_only = finished and self._section.last_save_model_only
        tensors = self._own(model_tensors(model_parts), model_parts)
        kept = HandlerState(() if model_only else handlers)
        if model_only:
            tensors = exported_tensors(self._world, tensors, self._section.export_dtype)
        else:
            tensors |= optimizer_tensors(model_parts, optimizers)
        self._require_finite(state.step, tensors, model_parts)
        tensors |= kept.tensors()
        ordered = dict(sorted(lanes.items(), key=lambda lane: int(lane[0])))
        whole = asdict(replace(state, lane_states=ordered)) | {"finished": finished}
        whole[HANDLERS_STATE] = kept.agreed_values(self._world)
        if self._base is not None:
            whole[BASE_STATE] = self._base.base_record()
        self._store.save(state.step, tensors, whole, model_only, blocking=last)
        self._last_saved = state.step
        if kept.tensors() or any(True for part in model_parts for _ in part.buffers()):
            self.wait_for_staging()  # a forward may change them

    def save_seed(self, model_parts: Sequence[nn.Module]) -> None:
        """Save the initial weights as step 0."""
        assert self._store is not None
        tensors = model_tensors(model_parts)
        self._store.require_space(tensors)
        self._require_finite(0, tensors, model_parts)
        self._store.save(0, tensors, asdict(RunState()), model_only=True, blocking=True)

    def wait_for_staging(self) -> None:
        """Return when parameters and optimizer state may change: copies may be under way."""
        if self._store is not None:
            self._store.wait_for_staging()

    def save_failed(self) -> bool:
        """Return whether this rank knows that the save under way has failed."""
        return self._store is not None and self._store.save_failed

    def wait(self) -> None:
        """Wait for the save under way; raise `CheckpointError` on all ranks if it has failed."""
        if self._store is not None:
            self._store.wait()

    def raise_failure(self) -> None:
        """Raise `CheckpointError`; called on all ranks when one of them says `save_failed`."""
        self.wait()
        raise CheckpointError("a checkpoint was not saved; the log of another rank says why")

    def describe_newest(self) -> str:
        """Return a sentence on the checkpoint that the same command would continue from."""
        try:
            self.wait()
        except CheckpointError as failure:
            logger.error("%s", failure)
        if self._store is None or self._section.load_only:
            return "Nothing of this run is saved"
        if self._store.saved_step < 0:
            return "No checkpoint of this run is saved: the same command starts from step 0"
        return (
            f"The newest checkpoint is step {self._store.saved_step}, which was found to be"
            " finite: the same command continues from it"
        )

    def _require_finite(
        self, step: int, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> None:
        names = non_finite_tensors(self._world, tensors, parts)
        if not names:
            return
        cause = "Lower optimizer.lr, lengthen the warmup, or look at the handlers' hooks"
        if step == 0:
            cause = "Look at the model's init_rule, and at its handlers"
        raise NonFiniteError(
            f"step {step} is not saved because these hold NaN or infinity: {some_of(names)}."
            f" {cause}. {self.describe_newest()}"
        )

    def _require_finite_start(
        self, path: object, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
    ) -> None:
        """Raise `NonFiniteError` if what was loaded is not finite; move such a step aside."""
        names = non_finite_tensors(self._world, tensors, parts)
        if not names:
            return
        fault = f"{path} cannot be trained: these hold NaN or infinity: {some_of(names)}"
        if self.found is None:
            raise NonFiniteError(f"{fault}. Set checkpoint.initial_load_path to other weights")
        if self._section.load_step >= 0:
            raise NonFiniteError(f"{fault}. Choose an earlier step with checkpoint.load_step")
        store, step = self._store, self.found.step
        assert store is not None
        what = f"{self.found.path} could not be moved aside"
        run_on_rank0(self._world, what, lambda: quarantine(store.folder, step, fault))
        raise NonFiniteError(
            f"{fault}. It is moved aside: the same command continues from the step before, if any"
        )
