"""`Checkpointer`: saving, beside training or not, and which checkpoint a run continues from.

How a checkpoint appears is said in `commit`. A load believes nothing: it picks the newest step
whose files all match their digests, moves damaged ones aside with a loud message, and compares
names, shapes and types with the model before the first tensor is written.

Rank 0 decides (file systems may show ranks different listings), all ranks write, digest and verify
their share, and all ranks get the same outcome: the same step, or the same error.
"""

import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from torchtitan.checkpoint.agreement import on_all, run_on_rank0
from torchtitan.checkpoint.background import Background
from torchtitan.checkpoint.commit import Commit, describe_on_all_ranks
from torchtitan.checkpoint.dcp_io import METADATA_NAME, SafeReader, check_metadata, quiet_dcp
from torchtitan.checkpoint.disk_space import (
    Room,
    file_limit,
    file_limit_problems,
    memory_problem,
    room_in,
    room_problems,
)
from torchtitan.checkpoint.files import PRIVATE_TO_WRITE, TRUST_FIX
from torchtitan.checkpoint.initial_load import verify_share
from torchtitan.checkpoint.manifest import (
    InvalidCheckpoint,
    Manifest,
    manifest_differences,
    manifest_from_json,
    manifest_to_json,
    verify_file,
)
from torchtitan.checkpoint.staging import Staging, num_local_bytes
from torchtitan.checkpoint.steps_folder import (
    committed_steps,
    delete_leftovers,
    inspect_step,
    move_aside,
    step_folders,
    step_name,
    unprotected_parts,
)
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext, with_own_group
from torchtitan.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

_SHARED_WAIT_SECONDS = 10.0
_OWN_FILES = 8
"""Of a checkpoint, beside what ranks write: its metadata, its manifest, marks of the commit."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified to the byte."""

    step: int
    path: Path
    manifest: Manifest

    @property
    def model_only(self) -> bool:
        """Whether it holds the model alone, so that training cannot continue from it."""
        return self.manifest.model_only

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state that was saved with it."""
        return self.manifest.state


class Checkpointer:
    """Saves and finds checkpoints in `folder`. Every method but `steps` is collective (the
    constructor too): all ranks call it, with the same step.

    `run_info` holds `run_id` and whatever else a manifest should keep (config, mesh, versions), as
    JSON values. `on_site(name, step)` is called between the phases of a save; tests kill processes
    there. `save_timeout_seconds` is how long the ranks wait for each other in a save beside
    training. The caller holds the lock of the run folder.
    """

    def __init__(
        self,
        section: Checkpoint,
        folder: Path,
        world: DistributedContext,
        run_info: Mapping[str, Any],
        on_site: Callable[[str, int], None] = lambda site, step: None,
        save_timeout_seconds: int = 300,
    ):
        self.section = section
        self.folder = Path(folder)
        self.world = world
        self.run_id = str(run_info["run_id"])
        self.on_site = on_site
        self.resumed_from = -1
        self._damaged: list[tuple[int, str]] = []
        self.saved_step = -1
        """The last step that this process knows to be committed."""
        writers, self._background = world, Background()
        self._staging: Staging | None = None
        if section.async_mode != "disabled":
            writers = with_own_group(world, save_timeout_seconds)
            self._staging = Staging(pinned=section.async_mode == "async_with_pinned_mem")
        info = {key: value for key, value in run_info.items() if key != "run_id"}
        self._commit = Commit(section, self.folder, writers, self.run_id, info, on_site)
        quiet_dcp()
        what = f"the checkpoint folder {self.folder} cannot be used"
        run_on_rank0(self.world, what, self._prepare_folder)
        if world.world_size > 1:
            self._require_shared_folder(what)

    def steps(self) -> list[int]:
        """Committed steps of this run in ascending order; contents are not read."""
        return committed_steps(self.folder, self.run_id)

    def require_space(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise `ConfigError`, on all ranks, when the disk has no room for a checkpoint of these
        tensors and some more, or a machine's memory none for the copies of its ranks. For the start
        of a run, before the first step is trained."""
        shares = self.world.gather_distinct_json(
            {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        )
        sizes = {name: size for share in shares for name, size in share.items()}
        room = Room(*self.world.broadcast_json(room_in(self.folder)))
        # A file of each rank, and a few beside them.
        num_files = self.world.world_size + _OWN_FILES
        problems = room_problems(self.folder, self.section, sum(sizes.values()), num_files, room)
        if problems and self.section.allow_low_disk:
            if self.world.is_main:
                logger.warning("%s", "; ".join(map(str, problems)))
        elif problems:
            raise ConfigError(problems)
        limits = self.world.gather_json(file_limit())
        problems = file_limit_problems(self.folder, sum(sizes.values()), limits)
        if problems:
            raise ConfigError(problems)
        if self._staging is not None:
            self._require_memory(sum(map(num_local_bytes, tensors.values())))

    def _require_memory(self, num_bytes: int) -> None:
        """Of each machine, for the copies that its ranks make of so many bytes each."""
        ranks = self.world.gather_json([socket.gethostname(), num_bytes, available_bytes()])
        for host in sorted({host for host, *_ in ranks}):
            needed = sum(size for name, size, _ in ranks if name == host)
            known = [free for name, _, free in ranks if name == host and free is not None]
            if known and min(known) < needed:
                mode = self.section.async_mode
                raise ConfigError(memory_problem(mode, host, needed, min(known)))

    # --- save -----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        model_only: bool = False,
        blocking: bool = False,
    ) -> None:
        """Commit a checkpoint of `step`, then delete old ones by `checkpoint.keep_latest_k`.

        `tensors` may be DTensors, and may differ between ranks; `state` (JSON) is rank 0's. A step
        that is already committed is left as it is. Raises the same `CheckpointError` on all ranks,
        with nothing committed, when anything fails on any of them.

        By `checkpoint.async_mode`, and unless `blocking`, the tensors are copied and the rest goes
        on while training continues: call `wait_for_staging` before they change, and `wait` at the
        end. An earlier save is waited for first, and its error raised.
        """
        self.wait()
        commit = partial(
            self._commit.save, state=state, model_only=model_only, protected=self.resumed_from
        )
        if self._staging is None or blocking:
            commit(step, tensors)
            self.saved_step = step
            self.world.barrier()  # rank 0 may still be deleting old steps
            return
        started = time.monotonic()
        staging, copies = self._staging, self._staging.start(tensors)
        logger.info("Copied step %d to save it, in %.1f s.", step, time.monotonic() - started)

        def finish() -> None:
            staging.finish()
            commit(step, copies)
            self.saved_step = step

        self._background.start(step, finish)

    def wait_for_staging(self) -> None:
        """To be called before the tensors that `save` was given change."""
        if self._staging is not None:
            self._staging.wait_for_staging()

    @property
    def save_failed(self) -> bool:
        """Whether `wait` would raise at once, as far as this rank knows."""
        return self._background.failed

    def wait(self) -> None:
        """Return when nothing is being saved; raises `CheckpointError` when the save has failed,
        on all ranks."""
        self._background.wait()

    def _prepare_folder(self) -> None:
        self.folder.mkdir(mode=PRIVATE_TO_WRITE, parents=True, exist_ok=True)
        unprotected = [] if self.section.trust_path else unprotected_parts(self.folder)
        if unprotected:
            raise PermissionError(f"anybody may write to {unprotected[0]}: {TRUST_FIX}")
        for name in delete_leftovers(self.folder, self.run_id):
            logger.info("Removed %s, left by a process that was killed.", name)

    def _require_shared_folder(self, what: str) -> None:
        """All machines must see one folder, or every checkpoint would be taken for damaged."""

        def make_file() -> str:
            name = f".shared-{secrets.token_hex(8)}"
            (self.folder / name).touch()
            return name

        name = run_on_rank0(self.world, what, make_file)

        def wait_for_file() -> None:
            deadline = time.monotonic() + _SHARED_WAIT_SECONDS
            while not (self.folder / name).exists():
                if time.monotonic() > deadline:
                    raise FileNotFoundError(
                        "rank 0's files do not appear there; job.dump_folder must be on a file"
                        " system that all machines share"
                    )
                time.sleep(0.1)

        try:
            on_all(self.world, what, wait_for_file)
        finally:
            if self.world.is_main:
                (self.folder / name).unlink(missing_ok=True)

    # --- find and load --------------------------------------------------------------------------

    def find(self, load_step: int = -1) -> Found | None:
        """The checkpoint to continue from: `load_step`, or the newest good one for -1.

        None when there is no `step-N` folder at all. Changes nothing: that is up to `begin`.
        Raises `CheckpointError` when steps are there and none is good, when `load_step` is missing
        or damaged, or when a step is another run's.
        """
        what = f"no checkpoint in {self.folder} can be used"
        candidates = run_on_rank0(self.world, what, lambda: self._candidates(load_step))
        damaged: list[tuple[int, str]] = []
        for step in candidates:
            found, fault = self._verify(step)
            if found is not None:
                self._damaged, self.resumed_from = damaged, found.step
                return found
            damaged.append((step, fault))
        if not damaged:
            return None
        faults = "; ".join(fault for _, fault in damaged)
        raise CheckpointError(
            f"{what}: {faults}. Nothing was overwritten. Restore one of them, choose"
            " another with checkpoint.load_step, or start anew in another job.dump_folder or with"
            " job.new_run"
        )

    def begin(self) -> None:
        """Move aside what stands in the way of going on from the step that was found: damaged steps
        (to `quarantine-step-N-...`, with an error in the log) and later ones (`rewound-...`)."""

        def move() -> None:
            for step, fault in self._damaged:
                self._quarantine(step, fault)
            if self.resumed_from >= 0:
                self._move_later_steps(self.resumed_from)

        run_on_rank0(self.world, f"{self.folder} cannot be changed", move)
        self._damaged = []

    def load(self, found: Found, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from a checkpoint, and return the JSON state saved with it.

        The tensors of all ranks together must be exactly the checkpoint's, with its shapes and
        types; otherwise `CheckpointError` lists the differences, before any tensor was written.
        """
        self.on_site("load.begin", found.step)
        ranks = describe_on_all_ranks(self.world, tensors)
        differences = manifest_differences(found.manifest, ranks)
        if differences:
            raise CheckpointError(f"{found.path} does not fit the run: {differences}")

        def read() -> None:
            reader = SafeReader(found.path)
            group = self.world.control_group
            dcp.load(dict(tensors), storage_reader=reader, process_group=group)

        on_all(self.world, f"{found.path} could not be loaded", read)
        return found.state

    def quarantine(self, found: Found, fault: str) -> None:
        """Move a step aside in which a reader has found a fault, so that none continues from it."""
        what = f"{found.path} could not be moved aside"
        run_on_rank0(self.world, what, partial(self._quarantine, found.step, fault))

    def _candidates(self, load_step: int) -> list[int]:
        """Rank 0's list of steps to try, newest first."""
        steps = step_folders(self.folder)
        for step in steps:
            manifest = inspect_step(self.folder, step).manifest
            if manifest is not None and manifest.run_id != self.run_id:
                raise InvalidCheckpoint(
                    f"{step_name(step)} is of run {manifest.run_id}, this is run {self.run_id}"
                )
        if load_step < 0:
            return steps[::-1]
        if load_step not in steps:
            raise InvalidCheckpoint(f"there is no {step_name(load_step)}, only steps {steps}")
        if steps[-1] > load_step and not self.section.allow_rewind:
            raise InvalidCheckpoint(
                f"{step_name(steps[-1])} is later than checkpoint.load_step = {load_step}; set"
                " checkpoint.allow_rewind to move later steps aside"
            )
        return [load_step]

    def _verify(self, step: int) -> tuple[Found | None, str]:
        """Read every byte of a step, each rank its share; returns the step, or what is wrong."""
        path = self.folder / step_name(step)
        answer = self.world.broadcast_json(self._inspect(step) if self.world.is_main else None)
        if "fault" in answer:
            return None, answer["fault"]
        manifest = manifest_from_json(answer)
        fault = ""
        try:
            verify_share(self.world, path, manifest)
        except InvalidCheckpoint as error:
            fault = str(error)
        faults = [text for text in self.world.gather_json(fault) if text]
        return (None, faults[0]) if faults else (Found(step, path, manifest), "")

    def _inspect(self, step: int) -> dict[str, Any]:
        candidate = inspect_step(self.folder, step)
        if candidate.manifest is None:
            return {"fault": candidate.fault}
        try:
            # Its digest first: nothing reads a damaged pickle.
            path = self.folder / step_name(step)
            verify_file(path / METADATA_NAME, candidate.manifest.files[METADATA_NAME])
            check_metadata(path, candidate.manifest)
        except InvalidCheckpoint as error:
            return {"fault": str(error)}
        return manifest_to_json(candidate.manifest)

    def _quarantine(self, step: int, fault: str) -> None:
        try:
            moved = str(move_aside(self.folder, step, "quarantine"))
        except OSError as error:
            moved = f"where it is, as it cannot be moved ({error})"
        logger.error("CHECKPOINT DAMAGED: %s. Step %d is now %s.", fault, step, moved)

    def _move_later_steps(self, step: int) -> None:
        for later in step_folders(self.folder):
            if later > step and later not in dict(self._damaged):
                moved = move_aside(self.folder, later, "rewound")
                logger.warning("Going back to step %d: step %d is now %s.", step, later, moved)
