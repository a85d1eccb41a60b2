"""One log of many processes."""

import logging
import re
from collections.abc import Iterator

import pytest

from torchtitan.utils.logging import init_logging, ranks_to_show


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = logging.getLogger("torchtitan")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def speak(rank: int) -> None:
    init_logging(rank)
    logger = logging.getLogger("torchtitan.part")
    logger.info("to whom it may concern")
    logger.warning("beware")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {0}), ("3", {3}), ("0,2", {0, 2}), (" 1 , 2,", {1, 2}), ("all", {0})],
)
def test_log_rank(text: str, expected: set[int]) -> None:
    assert ranks_to_show(text) == expected


def test_rank_0_shows_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    speak(0)
    info, warning = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d to whom it may concern", info)
    assert warning.endswith("[rank 0] WARNING: beware")


def test_other_ranks_show_warnings_with_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    speak(5)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("[rank 5] WARNING: beware")
    assert not logging.getLogger("torchtitan.part").isEnabledFor(logging.INFO)


def test_log_rank_shows_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_RANK", "1,5")
    speak(5)
    info, _ = capsys.readouterr().err.splitlines()
    assert info.endswith("[rank 5] to whom it may concern")
    speak(0)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging(1, log_ranks=[0])
    init_logging(0, log_ranks=[0])
    logging.getLogger("torchtitan").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_exceptions_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging(2, log_ranks=[0])
    try:
        raise ValueError("the cause")
    except ValueError:
        logging.getLogger("torchtitan").exception("failed")
    text = capsys.readouterr().err
    assert "[rank 2] ERROR: failed" in text and "ValueError: the cause" in text
