"""Copies of tensors in host memory, for a save that goes on while training changes them.

On a CPU a copy is made at once. On a GPU `pinned` copies are made by a stream of their own, beside
the next step's forward and backward, and the device makes the optimizer wait for them: the host
waits for nobody. Their memory is kept for the next save, since pinning it takes long.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.utils.torch_compat import with_local


class Staging:
    """Where the copies are. One set at a time: a new one is started when the last is written."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._kept: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def start(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's part of `tensors`, DTensors as such. Read them after `finish`; the
        originals may change after `wait_for_staging`."""
        locals_ = {name: _local(tensor) for name, tensor in tensors.items()}
        with self._side_stream(any(local.is_cuda for local in locals_.values())):
            copies = {name: self._copy(name, local) for name, local in locals_.items()}
            if self._stream is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(self._stream)
        return {name: with_local(tensor, copies[name]) for name, tensor in tensors.items()}

    def wait_for_staging(self) -> None:
        """Let what the device does from here on wait until the copies are made."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def finish(self) -> None:
        """Wait until the copies are made."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, name: str, local: Tensor) -> Tensor:
        if not self._pinned:
            return local.to("cpu", copy=True)
        kept = self._kept.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = torch.empty(
                local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda
            )
            self._kept[name] = kept
        return kept.copy_(local, non_blocking=local.is_cuda)

    def _side_stream(self, on_gpu: bool) -> Any:
        """CUDA only, not run by any test here."""
        if not (self._pinned and on_gpu):
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


def num_local_bytes(tensor: Tensor) -> int:
    """Bytes of a copy of this rank's part."""
    local = _local(tensor)
    return local.numel() * local.element_size()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, without waiting for a collective that is under way."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
