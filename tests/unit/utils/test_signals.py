"""Being asked to stop, by real signals, a file, and the time."""

import os
import signal
from pathlib import Path

import pytest

from torchtitan.utils import processes
from torchtitan.utils.processes import STOP_SIGNALS, StopRequest, StopRequested


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted
    assert signal.getsignal(number) == before


def test_second_ctrl_c_interrupts() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted


@pytest.mark.fault("F14")
def test_second_request_of_a_scheduler_does_not() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_loop_a_signal_ends_the_process() -> None:
    with StopRequest(at_once=True) as stop:
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not stop.interrupted
    with StopRequest(at_once=True) as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.interrupted


def test_a_file_is_a_request(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.watch(tmp_path / "stop", None)
    assert not stop.poll()
    (tmp_path / "stop").touch()
    assert stop.poll()
    (tmp_path / "stop").unlink()
    assert stop.poll()


def test_two_steps_and_a_save_end_before_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a save has been timed, a twentieth of the time is kept for it."""
    now = 0.0
    monkeypatch.setattr(processes, "seconds_since_start", lambda: now)

    def asked_at(step_seconds: float, save_seconds: float | None) -> float:
        nonlocal now
        now, stop = 0.0, StopRequest()
        stop.watch(None, 1000.0)
        stop.step_seconds = step_seconds
        if save_seconds is not None:
            stop.expect_save(save_seconds)
        while not stop.poll():
            now += 1
        return now

    assert asked_at(0, None) == 950
    assert asked_at(0, 200) == 800
    assert asked_at(10, 200) == 780


def test_a_handler_from_outside_python_becomes_the_default() -> None:
    """Python cannot put it back, and names it None."""
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        stop._previous[signal.SIGUSR1] = None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    signal.signal(signal.SIGUSR1, before)
