"""Flight recorder: which collectives each rank had reached when one timed out or failed.

torch keeps the newest collectives of a process in a ring. Written by every rank, they show at which
one the ranks parted. On GPUs NCCL's watchdog writes its ring when a collective times out, to
`rank_N`, and here it is written if an error ends the run otherwise; torch's analyser reads it:

    python -m torch.distributed.flight_recorder.fr_trace RUN_FOLDER/comm_traces --prefix rank_

gloo has a ring too, which nobody writes and the analyser does not understand. On the CPU it is
written here, to `rank_N.jsonl`, a collective a line, newest last.
"""

import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torchtitan.config import ConfigError, DataError, NonFiniteError
from torchtitan.config.schema import Comm
from torchtitan.utils.torch_compat import gloo_trace, nccl_trace, ranks_of_groups

logger = logging.getLogger(__name__)

_SAYS_ITSELF_WHAT_IT_IS = (ConfigError, DataError, NonFiniteError)


class FlightRecorder:
    """Sets up torch's flight recorder, and writes its records if an error ends the run.

    Construct it before any process group, and enter it while there are process groups. `folder` is
    the run folder.
    """

    def __init__(self, section: Comm, folder: Path, rank: int, device_type: str):
        self._enabled = section.trace_buf_size > 0
        self._is_nccl = device_type == "cuda"
        self._folder = folder / section.save_traces_folder
        suffix = "" if self._is_nccl else ".jsonl"
        self._path = self._folder / f"{section.save_traces_file_prefix}{rank}{suffix}"
        self._modified_before = _modified(self._path)
        """An earlier start's; if it changes, NCCL's watchdog has been faster than this."""
        _set("TORCH_FR_BUFFER_SIZE", str(section.trace_buf_size), "TORCH_NCCL_TRACE_BUFFER_SIZE")
        if self._enabled and self._is_nccl:
            file = str(self._folder / section.save_traces_file_prefix)  # torch appends the rank
            _set("TORCH_FR_DUMP_TEMP_FILE", file, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
            _set("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                logger.warning("records of collectives cannot be written: %s", error)

    def __enter__(self) -> "FlightRecorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unforeseen = isinstance(error, Exception) and not isinstance(error, _SAYS_ITSELF_WHAT_IT_IS)
        if self._enabled and unforeseen:
            self._write()

    def _write(self) -> None:
        try:
            if _modified(self._path) == self._modified_before or not self._is_nccl:
                content = nccl_trace() if self._is_nccl else _lines(gloo_collectives())
                if not content:
                    logger.warning("No collectives of this rank are recorded")
                    return
                self._folder.mkdir(parents=True, exist_ok=True)
                self._path.write_bytes(content)
        except Exception as error:  # the error that ends the run is the one to be seen
            logger.warning("the record of collectives cannot be written: %r", error)
            return
        logger.warning("The newest collectives of this rank are in %s", self._path)


def _set(name: str, value: str, *older_names: str) -> None:
    """Set an environment variable of torch unless the user has, by this name or an older one.

    Older names stay unset: torch warns about them.
    """
    if not {name, *older_names} & os.environ.keys():
        os.environ[name] = value


def _modified(path: Path) -> int | None:
    """Nanoseconds; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


def gloo_collectives() -> list[dict[str, Any]]:
    """Return the newest collectives over gloo, oldest first.

    `number` counts the collectives of a group, so a collective has the same number on all ranks.
    gloo does not record which are done: the last may be the one that failed.
    """
    ranks = ranks_of_groups()
    collectives = []
    for entry in gloo_trace() or []:
        name, description = entry["process_group"]
        collectives.append(
            {
                "number": entry["collective_seq_id"],
                "operation": entry["profiling_name"].removeprefix("gloo:"),
                "sizes": entry["input_sizes"],
                "types": entry["input_dtypes"],
                "group": description,
                "ranks": ranks.get(name),
                "nanoseconds": entry["time_created_ns"],
            }
        )
    return collectives
