"""What was probably meant."""

import pytest

from torchtitan.config.suggest import nearest
from torchtitan.parallel.pipeline.schedules import SCHEDULES


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("1f1b", "1F1B"),
        ("Interleave1F1B", "Interleaved1F1B"),
        ("ZBV_ZeroBubble", "ZBVZeroBubble"),
        ("nothing like it", None),
        ("G", None),
    ],
)
def test_nearest(name: str, meant: str | None):
    assert nearest(name, SCHEDULES) == meant


@pytest.mark.parametrize(
    ("name", "known"), [("smollm2", ("llama2", "llama3")), ("lora", ("float8", "freeze"))]
)
def test_no_guess_at_what_is_merely_alike(name: str, known: tuple[str, ...]):
    assert nearest(name, known) is None
