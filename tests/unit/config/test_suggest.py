"""What was probably meant."""

import pytest

from torchtitan.config.suggest import nearest
from torchtitan.distributed.pipeline_schedule import SCHEDULES


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("1f1b", "1F1B"),
        ("Interleave1F1B", "Interleaved1F1B"),
        ("ZBV", "ZBVZeroBubble"),
        ("dual", "DualPipeV"),
        ("nothing like it", None),
        ("G", None),
    ],
)
def test_nearest(name: str, meant: str | None):
    assert nearest(name, SCHEDULES) == meant
