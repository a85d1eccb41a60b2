"""`CheckpointStore`: how a checkpoint is written, verified and loaded.

A save writes into a temporary folder, syncs and digests every file, lists them in the manifest, and
renames the folder to `step-N`. The rename is the commit: before it there is no checkpoint, after it
there is a whole one, wherever the process is killed. It runs on the main thread or, over a process
group of its own, on a thread while training goes on.

Rank 0 decides (file systems may show ranks different listings); every rank writes, digests and
verifies its share; all ranks get the same result or the same error.
"""

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint.async_save import SaveThread, Staging
from torchtitan.checkpoint.collective import (
    describe_on_all_ranks,
    read_tensors,
    run_on_all_ranks,
    run_on_rank0,
)
from torchtitan.checkpoint.dcp_io import (
    METADATA_NAME,
    StepWriter,
    check_metadata,
    quiet_dcp,
    without_crc32,
)
from torchtitan.checkpoint.disk_space import require_memory, require_space
from torchtitan.checkpoint.files import PRIVATE_TO_WRITE, TRUST_FIX
from torchtitan.checkpoint.manifest import (
    FileRecord,
    InvalidCheckpoint,
    Manifest,
    manifest_differences,
    manifest_from_json,
    manifest_to_json,
    record_file,
    verify_share,
    write_manifest,
)
from torchtitan.checkpoint.steps_folder import (
    committed_steps,
    delete_leftovers,
    delete_old_steps,
    inspect_step,
    move_aside,
    step_folders,
    step_name,
    temporary_name,
    unprotected_parts,
)
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext, with_own_group
from torchtitan.distributed.hang_report import SAVING
from torchtitan.utils.files import sync_folder
from torchtitan.utils.text import format_bytes
from torchtitan.utils.torch_compat import local_tensor

logger = logging.getLogger(__name__)

_SHARED_WAIT_SECONDS = 10.0
_FILES_OF_RANK_0 = 8
"""Metadata, manifest and marks of the commit, in addition to a file for each rank."""


@dataclass(frozen=True)
class VerifiedStep:
    """A checkpoint of which every byte was compared with the manifest."""

    step: int
    path: Path
    manifest: Manifest


class CheckpointStore:
    """The steps of one run in `folder`. All ranks call every method except `steps`.

    `run_info` holds `run_id` and what else a manifest keeps (config, mesh, versions), as JSON
    values. `save_timeout_seconds` bounds how long ranks wait for each other in an async save.
    `on_site(name, step)` is called between the phases of a save; tests kill processes there.
    `on_saved` gets the seconds that a save took; `uploading` returns a step that is being copied,
    which retention leaves alone. The caller holds the lock of the run folder.
    """

    def __init__(
        self,
        section: Checkpoint,
        folder: Path,
        world: DistributedContext,
        run_info: Mapping[str, Any],
        on_site: Callable[[str, int], None] = lambda site, step: None,
        save_timeout_seconds: int = 300,
        on_saved: Callable[[float], None] = lambda seconds: None,
        uploading: Callable[[], int] = lambda: -1,
    ):
        self.section = section
        self.folder = Path(folder)
        self.world = world
        self.run_id = str(run_info["run_id"])
        self.on_site = on_site
        self._on_saved, self._uploading = on_saved, uploading
        self.saved_step = -1
        """The last step that this process knows to be committed."""
        self.protected_step = -1
        """A step that is never deleted: the one this process resumed from."""
        self._info = {key: value for key, value in run_info.items() if key != "run_id"}
        self._writers, self._thread = world, SaveThread()
        self._staging: Staging | None = None
        if section.async_mode != "disabled":
            self._writers = with_own_group(world, save_timeout_seconds)
            self._staging = Staging(pinned=section.async_mode == "async_with_pinned_mem")
        quiet_dcp()
        what = f"the checkpoint folder {self.folder} cannot be used"
        run_on_rank0(world, what, self._prepare_folder)
        if world.world_size > 1:
            self._require_shared_folder(what)

    def steps(self) -> list[int]:
        """Return the committed steps of this run in ascending order; contents are not read."""
        return committed_steps(self.folder, self.run_id)

    def require_space(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise `ConfigError` if the disk, or host memory, has no room to save these tensors."""
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        require_space(
            self.section, self.folder, self.world, sizes, self.world.world_size + _FILES_OF_RANK_0
        )
        if self._staging is not None:
            copied = sum(local_tensor(tensor).nbytes for tensor in tensors.values())
            require_memory(self.section.async_mode, self.world, copied)

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
        that is already committed is left as it is. If anything fails on any rank, nothing is
        committed and all ranks raise the same `CheckpointError`.

        With `checkpoint.async_mode`, and unless `blocking`, only copies are made here, and a thread
        does the rest: call `wait_for_staging` before the tensors change, and `wait` at the end. An
        earlier save is waited for first, and its error raised.
        """
        self.wait()
        if self._staging is None or blocking:
            self._save(step, tensors, state, model_only)
            self.world.barrier()  # rank 0 may still be deleting old steps
            return
        started = time.monotonic()
        staging, copies = self._staging, self._staging.start(tensors)
        logger.info("Copied step %d to save it, in %.1f s.", step, time.monotonic() - started)

        def finish() -> None:
            staging.finish()
            self._save(step, copies, state, model_only)

        self._thread.start(step, finish)

    def wait_for_staging(self) -> None:
        """Return when the tensors given to `save` may change."""
        if self._staging is not None:
            self._staging.wait_for_staging()

    @property
    def save_failed(self) -> bool:
        """Return whether this rank knows that `wait` would raise."""
        return self._thread.failed

    def wait(self) -> None:
        """Wait for the save under way; raise `CheckpointError` on all ranks if it has failed."""
        self.world.watchdog.sign(SAVING)
        self._thread.wait()

    def _save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        model_only: bool,
    ) -> None:
        what = f"the checkpoint of step {step} was not saved"
        started = time.monotonic()
        self.on_site("ckpt.begin", step)
        name = run_on_rank0(self._writers, what, lambda: self._make_temporary(step))
        if name is None:
            logger.info("Step %d is already saved.", step)
            self.saved_step = step
            return
        temporary = self.folder / name
        try:
            files, descriptions = self._write(what, step, temporary, tensors)
            manifest = Manifest(
                self.run_id, step, model_only, files, descriptions, state, dict(self._info)
            )
            run_on_rank0(self._writers, what, lambda: self._commit(temporary, manifest))
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.on_site("ckpt.after_commit", step)
        size, seconds = format_bytes(manifest.num_bytes), time.monotonic() - started
        logger.info("Saved step %d (%s) in %.1f s.", step, size, seconds)
        self._on_saved(seconds)
        if self.world.is_main:
            self._delete_old(step)
        self.saved_step = step

    def _make_temporary(self, step: int) -> str | None:
        """Make the temporary folder; return its name, or None if the step is already committed."""
        if step in step_folders(self.folder):
            candidate = inspect_step(self.folder, step)
            if candidate.manifest is not None and candidate.manifest.run_id == self.run_id:
                return None
            moved = move_aside(self.folder, step, "quarantine")
            logger.error("%s: moved to %s", candidate.fault or "a step of another run", moved)
        name = temporary_name(step, self.run_id)
        (self.folder / name).mkdir(mode=PRIVATE_TO_WRITE)
        return name

    def _write(
        self, what: str, step: int, temporary: Path, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, FileRecord], dict[str, dict[str, Any]]]:
        """Write, sync and digest this rank's share; return the files and tensors of all ranks."""

        def write() -> dict[str, FileRecord]:
            writer = StepWriter(temporary)
            group = self._writers.control_group
            try:
                with without_crc32():
                    dcp.save(dict(tensors), storage_writer=writer, process_group=group)
            except (Exception, CheckpointException) as error:
                if writer.errors:
                    raise self._with_free_space(writer.errors[0]) from error
                raise
            self.on_site("ckpt.shard_written", step)
            names = sorted(path.name for path in temporary.glob(f"__{self.world.rank}_*.distcp"))
            names += [METADATA_NAME] * self.world.is_main
            records = {name: record_file(temporary / name) for name in names}
            self.on_site("ckpt.hashed", step)
            return records

        records = run_on_all_ranks(self._writers, what, write)
        listed = {name: [record.size, record.digest] for name, record in records.items()}
        files: dict[str, FileRecord] = {}
        for part in self._writers.gather_json(listed):
            files.update({name: FileRecord(*entry) for name, entry in part.items()})
        descriptions: dict[str, dict[str, Any]] = {}
        for described in describe_on_all_ranks(self._writers, tensors):
            descriptions.update(described)
        return files, descriptions

    def _with_free_space(self, error: OSError) -> OSError:
        if error.errno != errno.ENOSPC:
            return error
        free = format_bytes(shutil.disk_usage(self.folder).free)
        return OSError(error.errno, f"{error.strerror}: {free} are free", error.filename)

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        # DCP can lose data and report success: check that the files hold what it says it wrote.
        check_metadata(temporary, manifest)
        self.on_site("ckpt.manifest", manifest.step)
        write_manifest(temporary, manifest)
        sync_folder(temporary)
        self.on_site("ckpt.rename", manifest.step)
        # Fails where a non-empty step exists: a rename never replaces one.
        os.rename(temporary, self.folder / step_name(manifest.step))
        sync_folder(self.folder)

    def _delete_old(self, step: int) -> None:
        self.on_site("purge.begin", step)
        try:
            keep, protected = self.section.keep_latest_k, (self.protected_step, self._uploading())
            delete_old_steps(self.folder, self.run_id, step, keep, protected)
        except OSError as error:
            logger.warning("Old checkpoints could not be deleted: %s", error)

    # --- verify and load ------------------------------------------------------------------------

    def verify(self, step: int) -> tuple[VerifiedStep | None, str]:
        """Read every byte of a step, each rank its share; return the step, or what is wrong."""
        path = self.folder / step_name(step)
        answer = self.world.broadcast_json(self._inspect(step) if self.world.is_main else None)
        if "fault" in answer:
            return None, answer["fault"]
        manifest = manifest_from_json(answer)
        fault = ""
        try:
            verify_share(path, manifest, self.world.rank, self.world.world_size)
        except InvalidCheckpoint as error:
            fault = str(error)
        faults = [text for text in self.world.gather_json(fault) if text]
        return (None, faults[0]) if faults else (VerifiedStep(step, path, manifest), "")

    def load(self, found: VerifiedStep, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from a checkpoint, and return the JSON state saved with it.

        The tensors of all ranks together must be exactly the checkpoint's, with its shapes and
        types; otherwise `CheckpointError` lists the differences, before any tensor was written.
        """
        ranks = describe_on_all_ranks(self.world, tensors)
        differences = manifest_differences(found.manifest, ranks)
        if differences:
            raise CheckpointError(f"{found.path} does not fit the run: {differences}")
        read_tensors(self.world, found.path, tensors)
        return found.manifest.state

    def _inspect(self, step: int) -> dict[str, Any]:
        candidate = inspect_step(self.folder, step)
        if candidate.manifest is None:
            return {"fault": candidate.fault}
        try:
            check_metadata(self.folder / step_name(step), candidate.manifest)
        except InvalidCheckpoint as error:
            return {"fault": str(error)}
        return manifest_to_json(candidate.manifest)

    # --- the folder -----------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        self.folder.mkdir(mode=PRIVATE_TO_WRITE, parents=True, exist_ok=True)
        unprotected = [] if self.section.trust_path else unprotected_parts(self.folder)
        if unprotected:
            raise PermissionError(f"anybody may write to {unprotected[0]}: {TRUST_FIX}")
        for name in delete_leftovers(self.folder, self.run_id):
            logger.info("Removed %s, left by a process that was killed.", name)

    def _require_shared_folder(self, what: str) -> None:
        """Raise unless all machines see one folder: every checkpoint would look damaged."""

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
            run_on_all_ranks(self.world, what, wait_for_file)
        finally:
            if self.world.is_main:
                (self.folder / name).unlink(missing_ok=True)
