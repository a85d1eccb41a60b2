"""A process that runs command lines one after another, so that a test does not start one each.

Started as a program, it reads requests and writes answers, a line of JSON each. With the argument
`--without-torch` every import of torch fails in it, so whatever works there needs no torch; with
`--without-pauses` nothing waits before it tries again.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str


class CliServer:
    """The process, from the side of the tests."""

    def __init__(self, *options: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        environment["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *options],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(self, *arguments: str, search: Path | None = None, **environment: str) -> Result:
        """`torchtitan ARGUMENTS` with these variables; `search` is a folder to import from."""
        assert self._process.stdin and self._process.stdout
        request = {"arguments": arguments, "environment": environment, "search": str(search or "")}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Result(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class _NoTorch:
    """Makes `import torch` fail as if it were not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)


def _answer(request: dict) -> tuple[int, str, str]:
    from torchtitan.cli import main

    out, err = io.StringIO(), io.StringIO()
    os.environ.update(request["environment"])
    if request["search"]:
        sys.path.insert(0, request["search"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(request["arguments"])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except Exception:
            traceback.print_exc()
            status = 1
    for name in request["environment"]:
        del os.environ[name]
    if request["search"]:
        sys.path.remove(request["search"])
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    if "--without-torch" in sys.argv:
        sys.meta_path.insert(0, _NoTorch())  # type: ignore[arg-type]
    if "--without-pauses" in sys.argv:
        time.sleep = lambda _: None
    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
