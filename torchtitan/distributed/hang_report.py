"""The process that watches one rank, and the report of a hang. Imports the standard library only.

A stuck interpreter, or a stopped process, cannot end itself, so each rank has a small process that
reads the rank's signs of life from a page of memory they share (`watchdog.py` writes them). It ends
the rank when the rank gives no sign although

- another rank has recorded that it waited in vain, or the run has failed,
- or, should nobody wait for it, much longer than the timeout and than ever before in its phase.

It sends `DUMP`, at which faulthandler writes the stacks of all threads without the help of the
interpreter, and then SIGABRT, at which the rank exits with status 6. A rank that was ended so, or
waited in vain, leaves a record; all records make one report, `hang.txt` in the run folder.
"""

import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

REPORT_NAME = "hang.txt"
RECORDS_NAME = ".hang"
"""The folder of the ranks' records, one folder for each start, in the run folder."""
PAGE = 4096
"""Bytes of the signs at the start of the shared file; stacks follow."""
SIGN = struct.Struct("<QBQd32s")
START_OF_SIGN = struct.Struct("<QB")
"""The fields that change at each wait."""
STARTUP, READING, SAVING, ENDING = "startup", "data", "checkpoint", "ending"
"""Phases in which a rank may be silent for as long as it likes, if nobody waits for it.

It may wait for a large save that goes on beside training. How long a read may take is decided where
the data are read.
"""
HANG = 6
DUMP = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
"""A signal that nothing else uses."""
_PERIOD = 0.5
_GRACE = 5.0
"""Seconds beyond the timeout, so that errors of the collectives themselves come first."""
_MORE = 10
"""A phase may take this many times the longest silence it had so far, or the timeout, if that is
more, beyond the timeout."""
_STOPPED = "T"


class Sign(NamedTuple):
    """A rank's newest sign of life."""

    number: int
    waiting: bool
    """It waits in a collective over gloo."""
    step: int
    """Steps it has finished."""
    timeout: float
    """Seconds that a collective may take now."""
    phase: str

    @classmethod
    def read(cls, page: mmap.mmap) -> "Sign":
        """Return the sign in the shared page."""
        number, waiting, step, timeout, phase = SIGN.unpack_from(page)
        name = phase.rstrip(b"\0").decode(errors="replace")
        return cls(number, bool(waiting), step, timeout, name)


class Silence:
    """Measures how long a rank gives no sign, and judges it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._counted = 0.0
        """The same without time in which the process was stopped, by Ctrl-Z or a debugger say."""
        self._sign = Sign(0, False, 0, 0.0, STARTUP)
        self._longest: dict[tuple[str, float], float] = {}

    def add(self, sign: Sign, seconds: float, stopped: bool) -> None:
        """Count `seconds` since the last call, with `sign` the newest one."""
        if sign.number != self._sign.number:
            # Phases of the first step, which compiles, have another timeout than later ones.
            key = self._sign.phase, self._sign.timeout
            self._longest[key] = max(self._longest.get(key, 0.0), self._counted)
            self._sign, self.seconds, self._counted = sign, 0.0, 0.0
        else:
            self.seconds += seconds
            self._counted += 0.0 if stopped else seconds

    def is_suspicious(self) -> bool:
        """Return True when it is time to see whether other ranks have given up."""
        return self._sign.phase != ENDING and self.seconds > self._sign.timeout / 2

    def outlasts_failure(self) -> bool:
        """Return True where a rank of a failed run would have noticed the failure."""
        judged = self._sign.phase not in (STARTUP, ENDING)
        return judged and self.seconds > self._sign.timeout + _GRACE

    def is_hopeless(self) -> bool:
        """Return True for a rank that is stuck, although nobody waits for it."""
        sign = self._sign
        # Now and then a step is much slower than others: it compiles again, or a hook evaluates.
        longest = max(self._longest.get((sign.phase, sign.timeout), 0.0), sign.timeout)
        limit = sign.timeout + _GRACE + _MORE * longest
        endless = (STARTUP, READING, SAVING, ENDING)
        return sign.phase not in endless and self._counted > limit


class Rank:
    """The watched rank: process `pid`, this one's parent, with the shared file `descriptor`.

    `place`: the folder of the records.
    """

    def __init__(self, place: str, rank: int, world_size: int, pid: int, descriptor: int):
        self._place, self._rank, self._world_size = place, rank, world_size
        self._folder = folder_of(place)
        self._pid, self._descriptor = pid, descriptor
        self._page = mmap.mmap(descriptor, PAGE)
        self._first_step: int | None = None
        self._end = select.poll()
        self._end.register(0, 0)  # the rank holds the other end of this pipe

    def watch(self) -> None:
        """Return when the rank has ended, by itself or by this process."""
        silence, last, strikes = Silence(), time.monotonic(), 0
        while not self._has_ended(_PERIOD):
            now = time.monotonic()
            sign, (state, traced) = Sign.read(self._page), _state(self._pid)
            if self._first_step is None and sign.phase != STARTUP:
                self._first_step = sign.step
            # This process may have been frozen as well, with its machine say.
            silence.add(sign, min(now - last, 2 * _PERIOD), state == _STOPPED or traced)
            last = now
            if traced:
                continue  # by a debugger
            # A rank that waits, too, is given time to notice by itself.
            vain = silence.is_suspicious() and has_records(self._place, but=self._rank)
            strikes = strikes + 1 if vain else 0
            if strikes >= 3 or silence.is_hopeless() or self._has_failed(silence):
                self._end_rank(sign, silence.seconds, state)
                return
        stacks = self._stacks()
        if stacks:
            sys.stderr.write(f"[rank {self._rank}] {stacks}")
        if "Fatal Python error: Aborted" in stacks:  # by NCCL's watchdog, say
            self._record(Sign.read(self._page), silence.seconds, "aborted", stacks)

    def _has_failed(self, silence: Silence) -> bool:
        return silence.outlasts_failure() and _status(self._folder).get("status") == "failed"

    def _has_ended(self, seconds: float) -> bool:
        """Wait up to `seconds` for the rank's end. Its children may hold the pipe's other end."""
        return bool(self._end.poll(1000 * seconds)) or os.getppid() != self._pid

    def _end_rank(self, sign: Sign, seconds: float, state: str) -> None:
        """Record where the rank is, then end it: its container may not outlive it."""
        what = "waited" if sign.waiting else "stuck"
        if state == _STOPPED:
            what = "stopped by a signal"
            self._kill()  # which makes it write, but train no further
        else:
            self._dump()
        stacks = self._stacks().removeprefix("Fatal Python error: Aborted\n")
        try:
            self._record(sign, seconds, what, stacks)
        finally:  # the disk may be full
            self._kill()

    def _dump(self) -> None:
        """Let the rank write its stacks, within some seconds."""
        os.kill(self._pid, DUMP)
        size = 0
        for _ in range(30):
            time.sleep(0.1)
            size, last = os.fstat(self._descriptor).st_size, size
            if size > PAGE and size == last:
                return

    def _kill(self) -> None:
        for number in (signal.SIGABRT, signal.SIGCONT, signal.SIGKILL):
            if not self._has_ended(0):
                os.kill(self._pid, number)
            if number != signal.SIGABRT:
                self._has_ended(10)

    def _stacks(self) -> str:
        size = os.fstat(self._descriptor).st_size - PAGE
        text = os.pread(self._descriptor, size, PAGE).decode(errors="replace")
        return text.partition("\nExtension modules:")[0]

    def _record(self, sign: Sign, seconds: float, what: str, stacks: str) -> None:
        write_record(self._place, self._rank, self._pid, sign, seconds, what, stacks)
        headline = merge(self._place, self._world_size)
        report = os.path.join(self._folder, REPORT_NAME)
        sys.stderr.write(f"[rank {self._rank}] ERROR: {headline}. All stacks: {report}\n")
        status = _status(self._folder)
        if status.get("status") != "running" or sign.phase == STARTUP:
            return  # other ranks, or an earlier start
        first = sign.step if self._first_step is None else self._first_step
        status["requeue"] = status["step"] > first  # the last saved one
        status |= {"status": "failed", "step": sign.step, "exit_code": HANG, "error": headline}
        status["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        _write(os.path.join(self._folder, "run_status.json"), json.dumps(status, indent=1) + "\n")


def folder_of(place: str) -> str:
    """Return the run folder with the records in `place`."""
    return os.path.dirname(os.path.dirname(place))


def _state(pid: int) -> tuple[str, bool]:
    """Return the letter of a process's state, and True if a debugger holds it."""
    try:
        with open(f"/proc/{pid}/status", errors="replace") as file:  # the name may be any bytes
            facts = dict(line.split(":", 1) for line in file if ":" in line)
        return facts["State"].split()[0], facts["TracerPid"].strip() != "0"
    except (OSError, KeyError):
        return "", False


def _status(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, "run_status.json")) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: str, text: str) -> None:
    # Containers often give the same process ids to their ranks.
    temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def has_records(place: str, but: int = -1) -> bool:
    """Return True if a rank, another than `but`, has left a record in `place`."""
    own = f"rank_{but}.json"
    return any(os.path.basename(path) != own for path in _records(place))


def _records(place: str) -> list[str]:
    try:
        return [os.path.join(place, name) for name in os.listdir(place) if name.endswith(".json")]
    except OSError:
        return []


def write_record(
    place: str, rank: int, pid: int, sign: Sign, seconds: float, what: str, stacks: str
) -> None:
    """Write what is known of a rank: `seconds` since its last sign, and what became of it."""
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": pid,
        "step": sign.step,
        "phase": sign.phase,
        "seconds": seconds,
        "since": time.time() - seconds,
        "what": what,
        "stacks": stacks,
    }
    os.makedirs(place, exist_ok=True)
    _write(os.path.join(place, f"rank_{rank}.json"), json.dumps(record))


def merge(place: str, world_size: int) -> str:
    """Write the report from the records that are there; return its first line.

    Several ranks may merge at once: each writes its record before, and looks again after.
    """
    merged: set[str] = set()
    headline = ""
    while merged != (paths := set(_records(place))):
        records = []
        for path in paths:
            with open(path) as file:
                records.append(json.load(file))
        headline, text = _report(records, world_size)
        _write(os.path.join(folder_of(place), REPORT_NAME), text)
        merged = paths
    return headline


def _report(records: list[dict[str, Any]], world_size: int) -> tuple[str, str]:
    # Who waits in a collective is not late; of the others, the one with the oldest sign is first.
    records.sort(key=lambda record: (record["what"] == "waited", record["step"], record["since"]))
    first = records[0]
    absent = sorted(set(range(world_size)) - {record["rank"] for record in records})
    if first["what"] != "waited":
        headline = f"Rank {first['rank']} was late first: {_describe(first)}"
    elif absent:
        names = ", ".join(map(str, absent))
        headline = f"No record of ranks {names}, for which others waited"
    else:
        headline = "All ranks waited for each other"
    parts = [f"{headline}\n{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n"]
    for record in records:
        title = f"rank {record['rank']} ({record['host']}, process {record['pid']})"
        parts.append(f"{title}: {_describe(record)}\n\n{record['stacks'].strip()}\n")
    if absent:
        parts.append(
            f"No record of rank {', '.join(map(str, absent))}: killed, or this folder cannot be"
            " reached from there\n"
        )
    return headline, "\n".join(parts)


def _describe(record: dict[str, Any]) -> str:
    place = f"after step {record['step']} in the phase {record['phase']}"
    return f"{record['what']} {place}, without a sign for {record['seconds']:.0f} s"


def main(place: str, *numbers: str) -> None:
    """Watch the parent of this process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank's to act upon
    Rank(place, *map(int, numbers)).watch()


if __name__ == "__main__":
    main(*sys.argv[1:])
