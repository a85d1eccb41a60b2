"""`Commit`: how a checkpoint appears.

A save writes into a temporary folder, syncs and digests every file, lists them in the manifest, and
renames the folder to `step-N`. The rename is the commit: before it there is no checkpoint, after it
there is a whole one, wherever the process is killed. It may run on the main thread or, with a
process group of its own, beside it.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint.agreement import on_all, run_on_rank0
from torchtitan.checkpoint.dcp_io import (
    METADATA_NAME,
    StepWriter,
    check_metadata,
    describe_tensor,
    without_crc32,
)
from torchtitan.checkpoint.disk_space import shown_bytes
from torchtitan.checkpoint.files import PRIVATE_TO_WRITE, sync_folder
from torchtitan.checkpoint.manifest import FileRecord, Manifest, record_file, write_manifest
from torchtitan.checkpoint.steps_folder import (
    delete_old_steps,
    inspect_step,
    move_aside,
    step_folders,
    step_name,
    temporary_name,
)
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext

logger = logging.getLogger(__name__)


class Commit:
    """Commits steps of a run in `folder`. `world` is the one whose control group the ranks agree
    over; the other arguments are those of `Checkpointer`."""

    def __init__(
        self,
        section: Checkpoint,
        folder: Path,
        world: DistributedContext,
        run_id: str,
        info: dict[str, Any],
        on_site: Callable[[str, int], None],
    ):
        self.section = section
        self.folder = folder
        self.world = world
        self.run_id = run_id
        self.info = info
        self.on_site = on_site

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        model_only: bool,
        protected: int,
    ) -> None:
        """Commit a checkpoint of `step`, then delete old ones, but never step `protected`.

        All ranks must call it. A step that is already committed is left as it is. Raises the same
        `CheckpointError` on all ranks, with nothing committed, when anything fails on any of them.
        """
        what = f"the checkpoint of step {step} was not saved"
        started = time.monotonic()
        self.on_site("ckpt.begin", step)
        name = run_on_rank0(self.world, what, lambda: self._begin(step))
        if name is None:
            logger.info("Step %d is already saved.", step)
            return
        temporary = self.folder / name
        try:
            files, descriptions = self._write(what, step, temporary, tensors)
            manifest = Manifest(
                self.run_id, step, model_only, files, descriptions, state, dict(self.info)
            )
            run_on_rank0(self.world, what, lambda: self._commit(temporary, manifest))
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.on_site("ckpt.after_commit", step)
        size, seconds = shown_bytes(manifest.num_bytes), time.monotonic() - started
        logger.info("Saved step %d (%s) in %.1f s.", step, size, seconds)
        if self.world.is_main:
            self._delete_old(step, protected)

    def _begin(self, step: int) -> str | None:
        """Make the temporary folder; None when the step is there already."""
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
        """Write, sync and digest this rank's share; returns all ranks' files and tensors."""

        def write() -> dict[str, FileRecord]:
            writer = StepWriter(temporary)
            group = self.world.control_group
            try:
                with without_crc32():
                    dcp.save(dict(tensors), storage_writer=writer, process_group=group)
            except (Exception, CheckpointException) as error:
                if writer.errors:
                    raise self._with_free_space(writer.errors[0]) from error
                raise
            self.on_site("ckpt.shard_written", step)
            records = {name: record_file(temporary / name) for name in self._own_files(temporary)}
            self.on_site("ckpt.hashed", step)
            return records

        records = on_all(self.world, what, write)
        listed = {name: [record.size, record.sha256] for name, record in records.items()}
        files: dict[str, FileRecord] = {}
        for part in self.world.gather_json(listed):
            files.update({name: FileRecord(*entry) for name, entry in part.items()})
        descriptions: dict[str, dict[str, Any]] = {}
        for described in describe_on_all_ranks(self.world, tensors):
            descriptions.update(described)
        return files, descriptions

    def _with_free_space(self, error: OSError) -> OSError:
        if error.errno != errno.ENOSPC:
            return error
        free = shown_bytes(shutil.disk_usage(self.folder).free)
        return OSError(error.errno, f"{error.strerror}: {free} are free", error.filename)

    def _own_files(self, temporary: Path) -> list[str]:
        own = sorted(path.name for path in temporary.glob(f"__{self.world.rank}_*.distcp"))
        return [*own, METADATA_NAME] if self.world.is_main else own

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        # DCP can lose data and report success; what it says it wrote must be in the files.
        check_metadata(temporary, manifest)
        self.on_site("ckpt.manifest", manifest.step)
        write_manifest(temporary, manifest)
        sync_folder(temporary)
        self.on_site("ckpt.rename", manifest.step)
        # Where a non-empty step exists, this fails: a rename never replaces one.
        os.rename(temporary, self.folder / step_name(manifest.step))
        sync_folder(self.folder)

    def _delete_old(self, step: int, protected: int) -> None:
        self.on_site("purge.begin", step)
        try:
            keep = self.section.keep_latest_k
            delete_old_steps(self.folder, self.run_id, step, keep, protected)
        except OSError as error:
            logger.warning("Old checkpoints could not be deleted: %s", error)


def describe_on_all_ranks(
    world: DistributedContext, tensors: Mapping[str, torch.Tensor]
) -> list[dict[str, dict[str, Any]]]:
    """What the tensors of all ranks are; those of ranks with the same tensors once."""
    return world.gather_distinct_json(
        {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    )
