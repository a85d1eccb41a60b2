"""Being asked to stop, by real signals."""

import os
import signal

import pytest

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
