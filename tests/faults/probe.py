"""Hooks in the ranks of a run under test, by `--job.custom_import=tests.faults.probe`.

Each rank notes a digest of every part that it saves, and rank 0 every commit, in the folder NOTES.
A rank kills itself at a site if `PROBE_FAULT` says so: `SITE:RANK:NTH` counts the times that the
rank gets there, from 1.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.faults.saving import digest
from torchtitan.checkpoint import dcp_io, manager, run_folder, steps_folder, store
from torchtitan.parallel.initialize import local_indices
from torchtitan.training import nonfinite_guard
from torchtitan.utils.torch_compat import local_tensor

RANK = int(os.environ.get("RANK", 0))
NOTES, START = Path(os.environ["PROBE_NOTES"]), os.environ["PROBE_START"]
_left, _steps = 0, 0
_site, _, _rest = os.environ.get("PROBE_FAULT", "").partition(":")
if _rest and int(_rest.split(":")[0]) == RANK:
    _left = int(_rest.split(":")[1])


def reach(site: str, step: int = 0) -> None:
    """Die here if it is the place and the time."""
    global _left, _steps
    if site == "step" and RANK == 0:
        _steps += 1
        (NOTES / f"steps.{START}").write_text(str(_steps))
    if site == _site and _left:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    if site == "ckpt.after_commit" and RANK == 0:
        (NOTES / f"ack.{step}.{START}").touch()


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Call `action` with the arguments of each call of a function, before it."""
    function = getattr(owner, name)

    def both(*arguments: Any, **named: Any) -> Any:
        action(*arguments, **named)
        return function(*arguments, **named)

    setattr(owner, name, both)


def note(_: Any, step: int, tensors: Mapping[str, torch.Tensor], *rest: Any, **named: Any) -> None:
    """Write where in the whole tensors this rank's parts lie, and their digests."""
    parts = {}
    for name, tensor in tensors.items():
        local = local_tensor(tensor.detach())
        if local.numel():
            places = [index.tolist() for index in local_indices(tensor)]
            parts[name] = [digest(local), *([ids[0], ids[-1] + 1] for ids in places)]
            assert all(ids == list(range(ids[0], ids[-1] + 1)) for ids in places), name
    unfinished = NOTES / f"unfinished.{RANK}"
    unfinished.write_text(json.dumps(parts))
    unfinished.rename(NOTES / f"parts.{step}.{START}.{RANK}")


def half_deleted(path: Any, *rest: Any, **named: Any) -> None:
    if ".trash-" in str(path) and _site == "purge.half":
        next(Path(path).glob("*.distcp")).unlink()
        reach("purge.half")


_init = store.CheckpointStore.__init__


def _init_and_watch(self: store.CheckpointStore, *arguments: Any, **named: Any) -> None:
    _init(self, *arguments, **named)
    self.on_site = reach


store.CheckpointStore.__init__ = _init_and_watch  # type: ignore[method-assign]
before(store.CheckpointStore, "save", note)
before(store.CheckpointStore, "verify", lambda *_: reach("load.verify"))
before(dcp_io.SafeReader, "read_data", lambda *_: reach("load.read"))
before(run_folder.RunFolder, "begin", lambda *_: reach("folder.begin"))
before(manager.CheckpointManager, "begin", lambda *_: reach("start.begin"))
before(nonfinite_guard.NonFiniteGuard, "record", lambda *_: reach("step"))
before(steps_folder.shutil, "rmtree", half_deleted)
