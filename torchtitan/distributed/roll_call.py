"""Roll call: which ranks are there, before there is a process group and after it has failed.

Over the store at which ranks meet. Before they train, all wait until each has said that it is there
or that it refuses, so a refusal of one ends all, with its message. When a run fails, each rank says
how it ended; the ones that say nothing are those that stand still or are dead.

The store belongs to torchrun, or else to rank 0, which is therefore the last one to leave.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from torchtitan.config.errors import ConfigError, ConfigIssue, HangError

T = TypeVar("T")

_POLL_SECONDS = 0.05
_LAST_TO_LEAVE_SECONDS = 20.0
"""Seconds for which rank 0 keeps its store for ranks that come late to hear of a refusal."""


@dataclass(frozen=True)
class Ending:
    """The way in which a rank's run ended."""

    rank: int
    code: int
    text: str
    lost: str = ""
    """"timeout" or "closed" if all it knows is that it lost contact with another rank."""


class RollCall:
    """The ranks' reports over `store`; `keeps_store`: the store lives in this process."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, keeps_store: bool):
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._keeps_store = keeps_store

    def start(self, seconds: float, refusal: Sequence[ConfigIssue] = ()) -> None:
        """Return when all ranks are there. A rank that cannot start gives the reason.

        Raises ConfigError, on all ranks alike, if any refuses, or if another run meets at this
        store, and HangError if a rank is not there within `seconds`. A refusal is not raised before
        rank 0, which prints it, is there.
        """
        if refusal:
            self._say("refused", problems=[problem.to_json() for problem in refusal])
        self._say("present")

        def settled() -> bool:
            if self._count("present") >= self._world_size:
                return True
            return self._count("refused") > 0 and 0 in self._ranks("present")

        wait_until(settled, seconds)
        refusals = self._said("refused")
        if refusals:
            self._leave(_LAST_TO_LEAVE_SECONDS, self._world_size)
            first = min(refusals, key=lambda said: said["rank"])
            error = ConfigError([ConfigIssue.from_json(text) for text in first["problems"]])
            error.known_to_all = True
            raise error
        if self._count("present") > self._world_size:
            fix = "set it, on all ranks of a run, to a port that no other run uses"
            raise ConfigError(
                ConfigIssue(
                    "MASTER_PORT", "ranks of another run meet there as well", fix, local=True
                )
            )
        missing = self._missing(self._ranks("present"))
        if missing:
            raise HangError(
                f"{_name(missing)} did not start within {seconds:.0f} s: the log there may say why"
            )

    def end(self, ending: Ending, seconds: float) -> list[Ending] | None:
        """Report how this rank ended and return the reports that arrive within `seconds`.

        The first report comes first. Returns None if the store does not answer.
        """

        def talk() -> list[Ending]:
            self._say("ended", **{key: vars(ending)[key] for key in ("code", "text", "lost")})
            wait_until(lambda: self._count("ended") == self._world_size, seconds)
            endings = [Ending(**said) for said in self._said("ended")]
            self._leave(2.0, len(endings))
            return endings

        return _within(seconds + 3.0, talk)

    def _leave(self, seconds: float, num_ranks: int) -> None:
        with suppress(RuntimeError):  # rank 0 may have seen this, and be gone
            self._say("left")
        if self._keeps_store:
            wait_until(lambda: self._count("left") >= num_ranks, seconds)

    def _say(self, what: str, **facts: Any) -> None:
        self._store.append(what, json.dumps({"rank": self._rank, **facts}) + "\n")
        self._store.add(f"{what}-count", 1)

    def _count(self, what: str) -> int:
        return self._store.add(f"{what}-count", 0)

    def _said(self, what: str) -> list[dict[str, Any]]:
        if not self._count(what):
            return []  # get() would wait for the key
        return [json.loads(line) for line in self._store.get(what).decode().splitlines()]

    def _ranks(self, what: str) -> set[int]:
        return {said["rank"] for said in self._said(what)}

    def _missing(self, ranks: Iterable[int]) -> list[int]:
        return sorted(set(range(self._world_size)) - set(ranks))


def explain(own: Ending, endings: Sequence[Ending] | None, world_size: int) -> Ending:
    """Return the ending of the run: the first rank's own error, else which ranks hang or are gone.

    `endings` are those of `RollCall.end`; `own` is one of them.
    """
    if not own.lost:
        return own
    if endings is None:
        return Ending(0, own.code, f"Rank 0 does not answer. {own.text}", own.lost)
    for ending in endings:
        if not ending.lost:
            text = f"Rank {ending.rank} failed first: {ending.text}"
            return Ending(ending.rank, ending.code, text)
    silent = sorted(set(range(world_size)) - {ending.rank for ending in endings})
    waited = [ending for ending in endings if ending.lost == "timeout"]
    if not waited:
        text = f"{_name(silent)} ended without a word, as one does that is killed"
        return Ending(silent[0] if silent else own.rank, own.code, f"{text}. {own.text}", "closed")
    late = silent or sorted(ending.rank for ending in endings if ending not in waited)
    who = _name(late) if late else "A rank"
    return Ending(
        late[0] if late else own.rank,
        waited[0].code,
        f"{who} did not arrive where the others waited. {waited[0].text}",
        "timeout",
    )


def _name(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"Ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return True when `condition` holds, or False when `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """Return `action`'s result, or None if it fails or takes longer.

    If the process that holds the store hangs, no call of the store returns.
    """
    results: list[T] = []

    def act() -> None:
        try:
            results.append(action())
        except RuntimeError:
            return

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
