"""Numbers as messages show them."""

import pytest

from torchtitan.utils.text import format_duration, plural


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.7, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (3599.6, "1h00m"),
        (4 * 86400 + 7 * 3600 + 59, "4d07h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (1234, "token", "1,234 tokens"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (2, "microbatch", "2 microbatches"),
    ],
)
def test_nouns_agree_with_their_count(count: int, noun: str, text: str) -> None:
    assert plural(count, noun) == text
