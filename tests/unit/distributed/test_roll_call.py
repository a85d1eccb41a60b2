"""Which rank is named when a run fails; whole runs are in tests/distributed/test_lost_ranks.py."""

import itertools
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from torchtitan.config import ConfigError, ConfigIssue, HangError
from torchtitan.distributed import context as world_module
from torchtitan.distributed.roll_call import Ending, RollCall, explain
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.processes import StopRequest, StopRequested

TIMED_OUT = Ending(0, 6, "Timed out waiting 3000ms", "timeout")
CUT_OFF = Ending(2, 1, "Connection closed by peer", "closed")


@pytest.mark.parametrize(
    ("endings", "rank", "code", "words"),
    [
        ([TIMED_OUT, CUT_OFF], 1, 6, "Rank 1 did not arrive"),
        ([CUT_OFF, TIMED_OUT], 1, 6, "Rank 1 did not arrive"),
        ([TIMED_OUT], 1, 6, "Ranks 1, 2 did not arrive"),
        # It came when the others had given up.
        ([TIMED_OUT, CUT_OFF, Ending(1, 1, "closed", "closed")], 1, 6, "Ranks 1, 2 did not arrive"),
        ([CUT_OFF, Ending(0, 1, "Connection closed", "closed")], 1, 1, "Rank 1 ended without a"),
        ([CUT_OFF, Ending(1, 8, "out of memory"), TIMED_OUT], 1, 8, "Rank 1 failed first: out of"),
        (None, 0, 6, "Rank 0 does not answer"),
    ],
)
def test_the_rank_that_is_at_fault(
    endings: list[Ending] | None, rank: int, code: int, words: str
) -> None:
    own = TIMED_OUT if endings is None else endings[0]
    found = explain(own, endings, world_size=3)
    assert (found.rank, found.code) == (rank, code)
    assert found.text.startswith(words)


def test_a_reason_of_its_own_is_this_rank_s() -> None:
    own = Ending(2, 3, "rows.jsonl, line 3: not JSON")
    assert explain(own, [Ending(1, 8, "out of memory"), own], world_size=3) is own


def test_ranks_that_do_not_start_are_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    for rank in (3, 1):
        with pytest.raises(HangError, match="did not start within 0 s"):
            RollCall(store, rank, 4, keeps_store=False).start(0.01)
    with pytest.raises(HangError, match="Rank 2 did not start"):
        RollCall(store, 0, 4, keeps_store=True).start(0.1)


def test_ranks_of_two_runs_at_one_store_are_told() -> None:
    """As where two jobs of mpiexec on a machine take the same default port."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    RollCall(store, 0, 1, keeps_store=True).start(1)
    with pytest.raises(ConfigError, match="MASTER_PORT: ranks of another run"):
        RollCall(store, 0, 1, keeps_store=False).start(1)


def test_problems_read_the_same_on_another_rank() -> None:
    for problem in (
        ConfigIssue("a.b", "is wrong", "mend it"),
        ConfigIssue("a.b", "is wrong", "mend it", value=("x", 1)),
        ConfigIssue("a.b", "is wrong", "mend it", value=None, local=True),
    ):
        assert str(ConfigIssue.from_json(problem.to_json())) == str(problem)


@pytest.mark.parametrize("attempt", ["0", "1"])
def test_a_launcher_s_store_does_not_mix_runs_up(
    attempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun keeps its store when it starts its ranks again, and for the next run of the same
    processes. Addresses of the run before would be those of nobody."""
    launcher_s = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(launcher_s.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    place = ProcessEnvironment(world_size=1, launched=True)
    before, roll_call = world_module.meet(place, 10)
    before.set("address", "of a rank that is gone")
    roll_call.start(10)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    if attempt != "0":  # in new processes
        monkeypatch.setattr(world_module, "_MEETINGS", itertools.count())
    after, roll_call = world_module.meet(place, 10)
    assert not after.check(["address"])
    roll_call.start(10)


@pytest.mark.parametrize("port", ["free", "not a port"])
def test_a_rank_that_waits_for_rank_0(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends the wait, which TCPStore would continue; a wrong port is not waited for."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        free = str(listener.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", free if port == "free" else port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    place, seconds = ProcessEnvironment(rank=1, world_size=2, launched=True), 30
    started = time.monotonic()
    with StopRequest(at_once=True), pytest.raises(StopRequested if port == "free" else HangError):
        if port == "free":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        world_module.meet(place, seconds)
    assert time.monotonic() - started < seconds / 2
