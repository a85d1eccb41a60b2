"""`checkpoint.remote_folder`: uploads of a run's steps beside its training, and a start from there.

The run folder stays on a file system; what is in the object store is a copy, which is read where
the run folder lacks it. There is no rename in a store: a step's manifest is uploaded last, and is
the commit. No torch.

    run_id                                   the run that the folder belongs to
    config.toml, metrics.jsonl, tokenizer/, ledger/     of the run folder
    checkpoint/step-N/...                    files of a step
    checkpoint/step-N/uploading.json         its manifest, until the upload is complete
    checkpoint/step-N/manifest.json          from then on
"""

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path

from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    read_manifest,
)
from torchtitan.checkpoint.steps_folder import committed_steps, step_name, steps_to_delete
from torchtitan.checkpoint.stored_run import (
    CONFIG_NAME,
    METRICS_NAME,
    RECORD_NAME,
    TOKENIZER_NAME,
)
from torchtitan.config.schema import Checkpoint
from torchtitan.utils.remote import RemoteError, RemoteFile, RemoteFolder
from torchtitan.utils.text import format_bytes

logger = logging.getLogger(__name__)

RUN_ID_NAME = "run_id"
STEPS_FOLDER = "checkpoint"
RUN_FILES = (CONFIG_NAME, METRICS_NAME, RECORD_NAME)
RUN_FOLDERS = (TOKENIZER_NAME, "ledger")
"""Folders of the run folder that a start on another machine needs, besides the step."""

_UPLOADING_NAME = "uploading.json"
_AGAIN_SECONDS = 30.0
_LAST_ATTEMPTS = 3
"""Uploads of a step that fail, one after the other, before a job ends without."""


class Uploads:
    """Uploads the newest committed step of a run on a thread. For rank 0, which sees all files.

    While an upload takes longer than the interval between saves, steps in between are left out.
    """

    def __init__(self, section: Checkpoint, run_folder: Path, run_id: str):
        assert section.remote_folder is not None
        self.uploading = -1
        """The step that is being uploaded, or is next: not to be deleted here."""
        self.error = ""
        """The failure of the last attempt; empty after a success."""
        self._keep = section.keep_latest_k
        self._run_folder, self._run_id = run_folder, run_id
        self._steps = run_folder / section.folder
        self._stop = threading.Event()
        self._remote = RemoteFolder(section.remote_folder, self._stop)
        self._wake, self._closing = threading.Event(), False
        self._done = -1
        self._known: dict[str, tuple[int, int]] = {}
        """Size and time of the run's files as they were uploaded."""
        # A daemon: an exit must not wait for a network that hangs.
        self._thread = threading.Thread(target=self._run, daemon=True, name="upload")
        self._thread.start()

    def step_saved(self) -> None:
        """Upload the newest step soon, unless it is there already."""
        self._wake.set()

    def finish(self) -> str:
        """Wait until the newest step is uploaded; return why it is not, or an empty text.

        It waits as long as uploads succeed, and gives up after some that failed in a row.
        """
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            logger.info("Waiting for the upload of the last step to %s.", self._remote.url)
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._stop.set()
            return "interrupted; the next start goes on with it"
        return self.error

    def _run(self) -> None:
        failures = 0
        while True:
            self._wake.wait(_AGAIN_SECONDS if self.error else None)
            self._wake.clear()
            try:
                self._upload_newest()
                is_newest = self._newest() == self._done
                failures, self.error = 0, ""
            except Exception as error:
                failures, is_newest = failures + 1, False
                self.error = str(error) or type(error).__name__
                expected = isinstance(error, OSError | InvalidCheckpoint)
                text = "Step %d is not uploaded yet: %s"
                logger.error(text, self.uploading, error, exc_info=None if expected else error)
            if self._closing and (is_newest or failures >= _LAST_ATTEMPTS):
                return
            if self._closing:
                self._wake.set()

    def _newest(self) -> int:
        return max(committed_steps(self._steps, self._run_id), default=-1)

    def _upload_newest(self) -> None:
        step = self.uploading = self._newest()
        if step < 0 or (step == self._done and not self._closing):
            return
        if not require_own(self._remote, self._run_id):
            self._remote.write(RUN_ID_NAME, self._run_id.encode())
        self._upload_run_files()
        if step == self._done:  # only metrics have come since
            return
        manifest = read_manifest(self._steps / step_name(step))
        if upload_step(self._remote, self._steps / step_name(step), manifest):
            size = format_bytes(manifest.num_bytes)
            logger.info("Uploaded step %d (%s) to %s.", step, size, self._remote.url)
        self._delete_old(step)
        self._done, self.uploading = step, -1

    def _upload_run_files(self) -> None:
        """Upload what the run folder holds apart from steps, if it has changed."""
        paths = [self._run_folder / name for name in RUN_FILES]
        for name in RUN_FOLDERS:
            paths += sorted((self._run_folder / name).rglob("*"))
        for path in paths:
            if path.is_file():
                status, name = path.stat(), str(path.relative_to(self._run_folder))
                now = (status.st_size, status.st_mtime_ns)
                if self._known.get(name) != now:
                    self._remote.upload(path, name)
                    self._known[name] = now

    def _delete_old(self, current: int) -> None:
        """Apply `keep_latest_k`; remove older uploads that never ended, and files gone from here.

        Later steps stay. The one here may be damaged, so that the run had to fall back, but theirs
        may not; `forget_later` removes those that the run has gone back from.
        """
        files = self._remote.files()
        steps = remote_steps(files)
        doomed = set(steps_to_delete(steps, current, self._keep, ()))
        unfinished = set(remote_steps(files, _UPLOADING_NAME)) - set(steps)
        doomed |= {step for step in unfinished if step < current}
        for step in sorted(doomed):
            _delete_step(self._remote, step, files)
        ledgers = [name for name in files if name.startswith("ledger/")]
        self._remote.delete(name for name in ledgers if not (self._run_folder / name).exists())


def forget_later(section: Checkpoint, run_id: str, step: int) -> None:
    """Delete the steps after `step` from the store, as the run goes back to it.

    Before anything is trained: a start would take them for steps to go on from. Raises RemoteError.
    """
    assert section.remote_folder is not None
    remote = RemoteFolder(section.remote_folder)
    if require_own(remote, run_id):
        files = remote.files()
        for later in remote_steps(files):
            if later > step:
                _delete_step(remote, later, files)


def upload_step(remote: RemoteFolder, step: Path, manifest: Manifest) -> bool:
    """Upload a committed step; return False if it was there already.

    Files of an upload that was interrupted stay if they are of the same manifest: `uploading.json`
    says so, because a step that is trained again has files of the same names and sizes.
    """
    place = f"{STEPS_FOLDER}/{step.name}"
    content = (step / MANIFEST_NAME).read_bytes()
    files = _files_of_step(remote.files(), manifest.step)
    is_whole = all(
        name in files and files[name].size == record.size for name, record in manifest.files.items()
    )
    if is_whole and remote.read(f"{place}/{MANIFEST_NAME}") == content:
        remote.delete([f"{place}/{_UPLOADING_NAME}"] * (_UPLOADING_NAME in files))
        return False
    if MANIFEST_NAME in files or remote.read(f"{place}/{_UPLOADING_NAME}") != content:
        _delete_step(remote, manifest.step, remote.files())
        remote.write(f"{place}/{_UPLOADING_NAME}", content)
        files = {}
    for name, record in manifest.files.items():
        if name not in files or files[name].size != record.size:
            remote.upload(step / name, f"{place}/{name}")
    remote.upload(step / MANIFEST_NAME, f"{place}/{MANIFEST_NAME}")
    remote.delete([f"{place}/{_UPLOADING_NAME}"])
    return True


def remote_steps(files: Iterable[str], marked_by: str = MANIFEST_NAME) -> list[int]:
    """Return the committed steps among the names of a remote folder, ascending."""
    prefix, suffix = f"{STEPS_FOLDER}/step-", f"/{marked_by}"
    numbers = (
        name[len(prefix) : -len(suffix)]
        for name in files
        if name.startswith(prefix) and name.endswith(suffix)
    )
    return sorted(int(number) for number in numbers if number.isdecimal())


def require_own(remote: RemoteFolder, run_id: str) -> bool:
    """Raise `RemoteError` if the folder holds another run's steps; return whether it is marked.

    A run that ended before it had uploaded a step leaves its mark, and nothing to protect.
    """
    found = remote.read(RUN_ID_NAME)
    is_own = found is not None and found.decode(errors="replace") == run_id
    if found is not None and not is_own and remote_steps(remote.files()):
        other = json.dumps(found.decode(errors="replace")[:40])
        raise RemoteError(f"{remote.url} belongs to run {other}, this is run {run_id}")
    return is_own


def _files_of_step(files: dict[str, RemoteFile], step: int) -> dict[str, RemoteFile]:
    prefix = f"{STEPS_FOLDER}/{step_name(step)}/"
    return {n.removeprefix(prefix): file for n, file in files.items() if n.startswith(prefix)}


def _delete_step(remote: RemoteFolder, step: int, files: dict[str, RemoteFile]) -> None:
    """Delete the files of a step, the manifest first: without it there is no step."""
    names = sorted(_files_of_step(files, step), key=lambda name: name != MANIFEST_NAME)
    remote.delete(f"{STEPS_FOLDER}/{step_name(step)}/{name}" for name in names)
