"""Reading what wandb wrote offline: a log of LevelDB's format that holds its protobuf messages."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class OfflineRun:
    """What one start of a run left in its folder."""

    def __init__(self, folder: Path):
        (file,) = folder.glob("run-*.wandb")
        self.run: Any = None
        self.history: list[dict[str, Any]] = []
        self.axis: str | None = None
        self.exit_code: int | None = None
        for record in _records(file.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
            elif kind == "history":
                self.history.append(_values(record.history.item))
            elif kind == "metric" and record.metric.glob_name == "*":
                self.axis = record.metric.step_metric
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was started with."""
        return _values(self.run.config.update)


def offline_runs(run_folder: Path) -> list[OfflineRun]:
    """In the order of their starts. Ends wandb in this process: until then its own process may keep
    the end of a file to itself."""
    import wandb

    wandb.teardown()
    return [OfflineRun(folder) for folder in sorted((run_folder / "wandb").glob("offline-run-*"))]


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data.startswith(b":W&B")
    message, at = b"", _FILE_HEADER_BYTES
    while at + _CHUNK_HEADER.size <= len(data):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < _CHUNK_HEADER.size:  # what is left of a block is void
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(data, at)
        at += _CHUNK_HEADER.size
        message = (
            data[at : at + length] if kind in (_FULL, _FIRST) else message + data[at : at + length]
        )
        at += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
