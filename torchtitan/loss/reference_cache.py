"""Log-probabilities of a reference, kept by the content of the answers.

An answer is known by a digest of its tokens and targets, so what is kept does not depend on the
mesh, the order of the data, their packing or the epoch.
"""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchtitan.config import DataError
from torchtitan.loss.preference import REFERENCE
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.utils.files import replace_file


class CachedLogProbs:
    """Sums of the reference's log-probabilities, by answer."""

    def __init__(self, keys: Tensor, log_probs: Tensor):
        """Keep `log_probs` `[N]` of the answers with `keys` int64 `[N]`; some may be equal."""
        # In place of an answer where there is none.
        keys, log_probs = (torch.cat([part.new_zeros(1), part]) for part in (keys, log_probs))
        self._keys, first = np.unique(keys.numpy(), return_index=True)
        self._log_probs = log_probs[torch.from_numpy(first)]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "CachedLogProbs":
        """Return what a frozen pass has recorded in `batches`; nothing of batches without it."""
        found = [batch for batch in batches if REFERENCE in batch]
        if not found:
            return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        keys = [answer_keys(batch).flatten() for batch in found]
        return cls(
            torch.cat(keys), torch.cat([batch[REFERENCE].flatten().cpu() for batch in found])
        )

    @classmethod
    def merged(cls, parts: Sequence["CachedLogProbs"]) -> "CachedLogProbs":
        """Return all together; of equal answers that of the first part counts."""
        keys = torch.cat([torch.from_numpy(part._keys) for part in parts])
        return cls(keys, torch.cat([part._log_probs for part in parts]))

    @classmethod
    def read(cls, path: Path) -> "CachedLogProbs | None":
        """Return the content of a file; None if it does not exist or is damaged."""
        try:
            with safe_open(path, "pt") as file:
                return cls(file.get_tensor("keys"), file.get_tensor("log_probs"))
        except (OSError, SafetensorError):
            return None

    def write(self, path: Path) -> None:
        """Write a file, as a whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.stem}-{uuid.uuid4().hex}")  # another run may write the same
        with replace_file(own) as file:
            file.write(save(self.tensors))
        own.replace(path)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The keys int64 `[N]` in ascending order, and the log-probabilities `[N]`."""
        return {"keys": torch.from_numpy(self._keys), "log_probs": self._log_probs}

    def annotated(self, batch: Batch) -> Batch:
        """Return `batch` with what is known of its answers. Raises DataError for an unknown one."""
        keys = answer_keys(batch)
        place = np.searchsorted(self._keys, keys.numpy()).clip(max=len(self._keys) - 1)
        if (self._keys[place] != keys.numpy()).any():
            raise DataError(
                "an answer was not there when the log-probabilities of the reference were computed:"
                " the data change from one reading to the next. Leave out loss.args.reference_cache"
            )
        return Batch({**batch, REFERENCE: self._log_probs[torch.from_numpy(place)]})


def answer_keys(batch: Batch) -> Tensor:
    """Return a key for each answer of the batch's pairs, int64 `[B, pairs, 2]`; 0 without targets.

    It is a digest of 64 bits of the answer's tokens, its prompt's included, and targets.
    """
    tokens, labels, documents = (
        batch[name].cpu().numpy() for name in ("tokens", "labels", "document_ids")
    )
    num_rows, length = tokens.shape
    keys = np.zeros((num_rows, length + length % 2), dtype=np.int64)
    for row in range(num_rows):
        starts = np.flatnonzero(np.diff(documents[row], prepend=-1))
        for start, end in zip(starts, [*starts[1:], length]):
            if (labels[row, start:end] == IGNORE_INDEX).all():
                continue
            content = np.stack([tokens[row, start:end], labels[row, start:end]]).tobytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            keys[row, documents[row, start]] = int.from_bytes(digest, "little", signed=True)
    return torch.from_numpy(keys).view(num_rows, -1, 2)
