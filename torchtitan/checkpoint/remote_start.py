"""A start whose run folder lacks what `checkpoint.remote_folder` has: download it first. No torch.

A step is downloaded to a temporary folder, every file is compared with the manifest, and one rename
commits it, as for a step that is saved. The start then goes on as if the step had been here.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torchtitan.checkpoint.decision import starts_anew
from torchtitan.checkpoint.files import PRIVATE_TO_WRITE
from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    read_manifest,
    verify_file,
)
from torchtitan.checkpoint.remote import (
    RUN_FILES,
    RUN_FOLDERS,
    RUN_ID_NAME,
    STEPS_FOLDER,
    remote_steps,
    require_own,
)
from torchtitan.checkpoint.steps_folder import move_aside, step_folders, step_name
from torchtitan.checkpoint.stored_run import StoredRun
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.utils.files import replace_file, sync_folder
from torchtitan.utils.remote import (
    RemoteError,
    RemoteFile,
    RemoteFolder,
    downloads_once,
    require_room,
)
from torchtitan.utils.text import format_bytes, some_of

logger = logging.getLogger(__name__)

KEY = "checkpoint.remote_folder"
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIX = "check its name, the credentials and the network"
Files = Mapping[str, RemoteFile]


def remote_issue(error: RemoteError, url: str | None, key: str = KEY) -> ConfigIssue:
    """Return the issue of a store that refuses, or does not answer."""
    return ConfigIssue(key, str(error), _FIX, url)


def fetch_run(config: JobConfig, is_main: bool = True) -> list[str]:
    """Download the newest good step of the run if it is later than what the run folder holds.

    Also the step of `checkpoint.load_step`, if it is not there. Every rank calls it, before any
    reads the run folder; one downloads. Returns notices. Raises `ConfigError`.
    """
    section = config.checkpoint
    if section.remote_folder is None or not section.enable:
        return []
    path = Path(config.job.dump_folder).resolve()
    try:
        path.mkdir(mode=PRIVATE_TO_WRITE, parents=True, exist_ok=True)
        with downloads_once(path / ".remote") as is_done:
            if is_done:
                return []
            return _fetch(config, path, RemoteFolder(section.remote_folder))
    except FolderInUse as error:
        if not is_main:  # a rank that comes late, while the first one has opened the folder
            return []
        fix = "wait for that job or stop it, or choose another --job.dump_folder"
        raise ConfigError(ConfigIssue("job.dump_folder", str(error), fix, str(path))) from error
    except RemoteError as error:
        raise ConfigError(remote_issue(error, section.remote_folder)) from error
    except OSError as error:
        text = f"cannot be used: {error.strerror or error}"
        fix = "choose a folder that this user may write to"
        raise ConfigError(ConfigIssue("job.dump_folder", text, fix, str(path))) from error


def _fetch(config: JobConfig, path: Path, remote: RemoteFolder) -> list[str]:
    found, files = remote.read(RUN_ID_NAME), remote.files()
    if not remote_steps(files):
        return []
    stored = StoredRun(path, config.checkpoint.folder)
    if found is None:
        if stored.is_run:
            return []
        text = f"{remote.url} holds steps, but not the file {RUN_ID_NAME}, which says whose"
        fix = "write the run_id of a step's manifest.json to it, or choose another one"
        raise ConfigError(ConfigIssue(KEY, text, fix, remote.url))
    run_id = found.decode(errors="replace")
    if not _RUN_ID.fullmatch(run_id):  # it becomes part of the name of a folder
        text, fix = f"{remote.url}/{RUN_ID_NAME} holds no run id", "restore it, or choose another"
        raise ConfigError(ConfigIssue(KEY, text, fix, remote.url))
    if starts_anew(config):
        text = f"{remote.url} holds run {run_id}, which job.new_run cannot move aside"
        fix = "choose another one for the new run"
        raise ConfigError(ConfigIssue(KEY, text, fix, remote.url))
    if stored.is_run:
        newest = stored.newest
        require_own(remote, str(stored.status.get("run_id") or (newest and newest.run_id)))
    return _fetch_steps(config, path, remote, files, run_id, stored)


def _fetch_steps(
    config: JobConfig,
    path: Path,
    remote: RemoteFolder,
    files: Files,
    run_id: str,
    stored: StoredRun,
) -> list[str]:
    """Download what is later than the newest step here, and `checkpoint.load_step`."""
    steps, wanted = path / config.checkpoint.folder, config.checkpoint.load_step
    newest = stored.newest.step if stored.newest else -1
    later = [step for step in reversed(remote_steps(files)) if step > newest]
    lacks_wanted = wanted in remote_steps(files) and wanted not in step_folders(steps)
    if later or lacks_wanted:
        FolderLock(path, run_id).release()  # no job is at work here, and none starts meanwhile
    faults, notices = [], []
    for step in later:
        try:
            notices.append(_fetch_step(remote, files, path, steps, step, run_id))
            break
        except InvalidCheckpoint as fault:
            faults.append(str(fault))
            notices.append(f"CHECKPOINT DAMAGED: {fault}. The step before is tried.")
    if len(faults) == len(later) and faults and newest < 0:
        text = f"{remote.url} holds no step that can be used: {some_of(faults, 4, '; ')}"
        fix = "restore one of them, or choose another folder for a new run"
        raise ConfigError(ConfigIssue(KEY, text, fix, remote.url))
    if lacks_wanted and wanted not in step_folders(steps):
        try:
            notices.append(_fetch_step(remote, files, path, steps, wanted, run_id))
        except InvalidCheckpoint as fault:
            issue = ConfigIssue("checkpoint.load_step", str(fault), "choose another", wanted)
            raise ConfigError(issue) from fault
    return notices


def _fetch_step(
    remote: RemoteFolder, files: Files, path: Path, steps: Path, step: int, run_id: str
) -> str:
    """Download a step and the files of its run, verify it and commit it; return a notice.

    Raises `InvalidCheckpoint`.
    """
    prefix = f"{STEPS_FOLDER}/{step_name(step)}/"
    content = remote.read(prefix + MANIFEST_NAME) or b""
    # The same name again after an interruption, and one that the next start removes.
    digest = hashlib.sha256(content).hexdigest()[:8]
    temporary = steps / f".tmp-{step_name(step)}-{run_id}-{digest}"
    temporary.mkdir(mode=PRIVATE_TO_WRITE, parents=True, exist_ok=True)
    with replace_file(temporary / MANIFEST_NAME) as file:
        file.write(content)
    manifest = read_manifest(temporary)
    if (manifest.run_id, manifest.step) != (run_id, step):
        raise InvalidCheckpoint(f"{remote.url}/{prefix}: is step {manifest.step} of another run")
    own = {n.removeprefix(prefix): file for n, file in files.items() if n.startswith(prefix)}
    _download_verified(RemoteFolder(f"{remote.url}/{prefix}"), own, temporary, manifest)
    _download_run_files(remote, files, path)
    sync_folder(temporary)
    if (steps / step_name(step)).exists():  # damaged, or it would not be looked for
        moved = move_aside(steps, step, "quarantine")
        logger.error("CHECKPOINT DAMAGED: step %d is now %s.", step, moved)
    os.rename(temporary, steps / step_name(step))
    sync_folder(steps)
    return f"Step {step} ({format_bytes(manifest.num_bytes)}) was downloaded from {remote.url}."


def _download_verified(
    remote: RemoteFolder, files: Files, folder: Path, manifest: Manifest
) -> None:
    """Download the files of a manifest that `folder` lacks. Raises `InvalidCheckpoint`."""
    for name, record in manifest.files.items():
        if name not in files:
            raise InvalidCheckpoint(f"{remote.url}/{name}: missing")
        if files[name].size != record.size:
            text = f"{files[name].size} bytes, written were {record.size}"
            raise InvalidCheckpoint(f"{remote.url}/{name}: {text}")
    lacking = {
        name: files[name]
        for name, record in manifest.files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != record.size
    }
    require_room(remote.url, folder, sum(file.size for file in lacking.values()))
    remote.download_all(folder, lacking)
    for name, record in manifest.files.items():
        try:
            verify_file(folder / name, record)
        except InvalidCheckpoint as error:
            (folder / name).unlink(missing_ok=True)  # or the next start would find it again
            text = f"{remote.url}/{name}: content differs from what was written"
            raise InvalidCheckpoint(text) from error


def _download_run_files(remote: RemoteFolder, files: Files, path: Path) -> None:
    """Replace the files of the run folder by those that were uploaded with a later step."""
    wanted = {
        name: file
        for name, file in files.items()
        if name in RUN_FILES or name.partition("/")[0] in RUN_FOLDERS
    }
    remote.download_all(path, wanted)
