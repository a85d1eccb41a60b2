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
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torchtitan.train",
        "tests.pool",
        "tests.forked",
    ]
)
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


def execute(
    words: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout: float = 240,
) -> CompletedProcess[str]:
    """Run `python [-m torch.distributed.run ...] -m torchtitan.train ...` or `python -c CODE ...`.

    Like `subprocess.run` with captured text, and with torchrun's exit status, which is 1 whatever
    the ranks' are. Raises TimeoutExpired.
    """
    processes, rest = _split_launcher(words)
    variables = [{}] if processes is None else launcher_variables(processes)
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        ranks = [
            CONTEXT.Process(target=serve, args=(rest, dict(env) | own, str(cwd or ""), outputs))
            for own in variables
        ]
        for rank in ranks:
            rank.start()
        try:
            statuses = _join(ranks, time.monotonic() + timeout)
        except TimeoutError:
            raise TimeoutExpired(words, timeout, *map(_text, outputs)) from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
                rank.close()
        status = statuses[0] if processes is None else int(any(statuses))
        return CompletedProcess(words, status, *map(_text, outputs))


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
    assert words[:2] == ["-m", "torchtitan.train"], words
    from torchtitan.cli import main

    sys.argv = ["torchtitan.train", *words[2:]]
    sys.exit(main(["train", *words[2:]]))
