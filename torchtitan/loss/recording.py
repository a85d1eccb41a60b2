"""Records of a frozen model, made where its loss would be, and added to the batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan.models.batch import IGNORE_INDEX, Batch


class Recording:
    """A `Loss` that computes nothing: subclasses define `sum`, which calls `record`."""

    def __init__(self) -> None:
        self._recorded: dict[str, list[Tensor]] = {}

    def count(self, batch: Batch) -> Tensor:
        """Return the number of targets."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def record(self, name: str, value: Tensor) -> None:
        """Keep `value` `[B, ...]` of the microbatch at hand."""
        self._recorded.setdefault(name, []).append(value)

    def annotated(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the batches, which were evaluated in this order, with what was recorded.

        Ranks without the end of the model have recorded nothing, and need nothing.
        """
        batches = list(microbatches)
        rows = [len(batch["tokens"]) for batch in batches]
        for name, values in self._recorded.items():
            parts: Sequence[Tensor] = values
            if [len(value) for value in values] != rows:  # a pipeline's, all of one length
                parts = torch.cat(values).split(rows)
            batches = [Batch({**batch, name: part}) for batch, part in zip(batches, parts)]
        return batches
