"""A dataset whose own state would lead a resume astray is found out by a trial before the run."""

from typing import Any

import pytest
from test_bad_data import facts_for, only
from torch.utils.data import IterableDataset

from torchtitan.data.registry import register_dataset
from torchtitan.preflight.data import check_environment


class Counting(IterableDataset[dict[str, str]]):
    """Resumes as it should."""

    def __init__(self, num_rows: int = 100) -> None:
        self.num_rows, self.start, self.at = num_rows, 0, 0

    def __iter__(self) -> Any:
        for number in range(self.start + 1, self.num_rows + 1):
            self.at = number
            yield {"text": f"row {self.at}"}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.at = state["at"]


class Stuck(Counting):
    """Keeps the state that was loaded."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.start or self.at}


class Forgetful(Counting):
    """Counts what was loaded twice; `datasets` 5.0.0 went astray at the same point."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at + self.start}


class Deaf(Counting):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Stuck, "does not change as rows are read"),
        (Forgetful, "taken after a load_state_dict does not lead to the next row"),
        (Deaf, "does not go on with the next row"),
        (Counting, ""),
        (lambda: Counting(2), ""),
    ],
)
def test_a_second_resume_is_tried_out(made, text):
    name = f"trial_{len(text)}_{getattr(made, '__name__', 'short').strip('<>')}"
    register_dataset(name, lambda training, data: made())
    problems = check_environment(facts_for(None, training__dataset=name, lanes=1))
    if not text:
        assert problems == []
        return
    problem = only(problems)
    assert text in problem.problem and "a resume would go wrong" in problem.problem
    assert "correct its state_dict" in problem.fix and problem.severity == "error"
