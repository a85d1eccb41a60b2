"""A dataset without files: sums of two numbers, in words that a model can learn."""

import random
from typing import Any

from torch.utils.data import Dataset


class Sums(Dataset[dict[str, str]]):
    """The n-th document is always the same, so a run can go on at any place."""

    def __init__(self, num_documents: int = 100_000, largest: int = 99):
        self.num_documents, self.largest = num_documents, largest

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, index: int) -> dict[str, str]:
        numbers = random.Random(index)
        a, b = numbers.randint(0, self.largest), numbers.randint(0, self.largest)
        return {"text": f"{a} + {b} = {a + b}\n"}


def sums(training: Any, data: Any) -> Sums:
    """Sums of two numbers below 100, made as they are read."""
    return Sums()
