"""Command lines of the program, run in processes forked from one that has imported torch.

A fresh process spends three seconds of a processor on imports, and torchrun two more. What a run
does after them is the same here: a process of its own, with its own variables, folder, output,
signals and exit status. Tests of the launcher, of the imports and of what precedes them start
fresh processes.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def keep_preloaded() -> None:
    """Let nothing else choose what the fork server of this process imports.

    There is one server a process, started by whatever needs it first. Reading processes of a
    dataset want it without torch, and every rank would import torch again.
    """
    forkserver.set_forkserver_preload = lambda modules: None


_GRACE_SECONDS = 30
"""How long ranks may go on after one of them failed: torchrun's."""


def launcher_variables(world_size: int) -> list[dict[str, str]]:
    """The variables that a launcher sets for the ranks of one machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    world = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


class ForkedRun:
    """A command line that runs, as `subprocess.Popen` has it; its ranks, under a launcher."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], cwd: Path | None = None):
        self.words = words
        self._launched, rest = _split_launcher(words)
        variables = [{}] if self._launched is None else launcher_variables(self._launched)
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._outputs = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        arguments = [(rest, dict(env) | own, str(cwd or ""), self._outputs) for own in variables]
        self._ranks = [CONTEXT.Process(target=serve, args=given) for given in arguments]
        for rank in self._ranks:
            rank.start()

    def send_signal(self, number: int) -> None:
        """Send a signal to each process."""
        for rank in self._ranks:
            os.kill(rank.pid, number)

    def poll(self) -> int | None:
        """Return the exit status of the first rank; None while it runs."""
        return self._ranks[0].exitcode

    def wait(self, timeout: float) -> CompletedProcess[str]:
        """Return what the processes printed, and torchrun's status: 1 whatever the ranks' are.

        Raises TimeoutExpired.
        """
        try:
            statuses = _join(self._ranks, time.monotonic() + timeout)
        except TimeoutError:
            raise TimeoutExpired(self.words, timeout, *map(_text, self._outputs)) from None
        status = statuses[0] if self._launched is None else int(any(statuses))
        return CompletedProcess(self.words, status, *map(_text, self._outputs))

    def close(self) -> None:
        """Kill what still runs."""
        for rank in self._ranks:
            rank.kill()
            rank.join()
            rank.close()
        self._folder.cleanup()


def execute(
    words: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout: float = 240,
) -> CompletedProcess[str]:
    """Run `python [-m torch.distributed.run ...] -m torchtitan ...` or `python -c CODE ...`.

    Like `subprocess.run` with captured text.
    """
    with closing(ForkedRun(words, env, cwd)) as run:
        return run.wait(timeout)


def _text(path: str) -> str:
    return Path(path).read_text("utf-8") if os.path.exists(path) else ""


def _split_launcher(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number of processes (None without a launcher), and the words after `python`."""
    assert words[0] == sys.executable
    rest = list(words[1:])
    if rest[:2] != ["-m", "torch.distributed.run"]:
        return None, rest
    sizes = [word for word in rest if word.startswith("--nproc_per_node=")]
    return int(sizes[0].partition("=")[2]), rest[rest.index("-m", 2) :]


def _join(ranks: Sequence[Any], deadline: float) -> list[int]:
    """The exit statuses. After the first failure the others are asked to stop, then killed."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            if any(rank.exitcode for rank in ranks):
                break
            raise TimeoutError
        failed = False
        for sentinel in ended:
            rank = running.pop(sentinel)  # type: ignore[index]
            rank.join()
            failed = failed or rank.exitcode != 0
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            for rank in running.values():
                rank.terminate()
    return [-signal.SIGKILL if rank.exitcode is None else rank.exitcode for rank in ranks]


def serve(words: list[str], env: dict[str, str], cwd: str, outputs: Sequence[str]) -> None:
    """Become the process that `python WORDS` would be."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if cwd:
        os.chdir(cwd)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        return
    assert words[0] == "-m" and words[1] in ("torchtitan", "torchtitan.train"), words
    from torchtitan.cli import main

    sys.argv = words[1:]
    sys.exit(main(["train", *words[2:]] if words[1] == "torchtitan.train" else words[2:]))
