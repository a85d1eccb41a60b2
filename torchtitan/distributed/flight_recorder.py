"""Flight recorder: which collectives each rank had reached when one timed out or failed.

torch keeps the newest collectives of a process in a ring, with their sizes, states and the lines of
Python that called them. Written by every rank, they show at which one the ranks parted:

    python -m torch.distributed.flight_recorder.fr_trace RUN_FOLDER/comm_traces --prefix rank_

NCCL's watchdog writes its ring by itself when a collective times out. gloo has a ring too, and
nobody who writes it: that is done here, when an error ends the run. On GPUs, where gloo only
carries the small talk, its file is called `gloo_...` beside NCCL's.
"""

import logging
import os
from pathlib import Path
from types import TracebackType

from torchtitan.config import ConfigError, DataError, NonFiniteError
from torchtitan.config.run_sections import Comm
from torchtitan.utils.torch_compat import gloo_trace

logger = logging.getLogger(__name__)

_SAYS_ITSELF_WHAT_IT_IS = (ConfigError, DataError, NonFiniteError)


class FlightRecorder:
    """Sets the recorder up when it is made, which must be before any process group is. Entered
    while there are process groups, it writes what gloo has recorded if an error comes through.

    `folder`: the run folder.
    """

    def __init__(self, section: Comm, folder: Path, rank: int, device_type: str):
        self._enabled = section.trace_buf_size > 0
        self._folder = folder / section.save_traces_folder
        prefix = section.save_traces_file_prefix
        gloo_prefix = f"gloo_{prefix}" if device_type == "cuda" else prefix
        self._path = self._folder / f"{gloo_prefix}{rank}"
        size = str(section.trace_buf_size)
        variables = {"TORCH_FR_BUFFER_SIZE": size, "TORCH_NCCL_TRACE_BUFFER_SIZE": size}
        if self._enabled and device_type == "cuda":
            variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
            # NCCL appends the rank. The same setting has the newer name in newer versions.
            file = str(self._folder / prefix)
            variables |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": file, "TORCH_FR_DUMP_TEMP_FILE": file}
            self._make_folder()
        for name, value in variables.items():
            os.environ.setdefault(name, value)

    def __enter__(self) -> "FlightRecorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unforeseen = isinstance(error, Exception) and not isinstance(error, _SAYS_ITSELF_WHAT_IT_IS)
        if self._enabled and unforeseen and self._make_folder():
            self._write()

    def _write(self) -> None:
        try:
            trace = gloo_trace()
            if trace is None:
                return
            self._path.write_bytes(trace)
        except Exception as error:  # the error that ends the run is the one to be seen
            logger.warning("the record of collectives cannot be written: %r", error)
            return
        logger.warning("Wrote the newest collectives of this rank to %s", self._path)

    def _make_folder(self) -> bool:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("the folder of records of collectives cannot be made: %s", error)
            return False
        return True
