"""Worker processes: deaf to the launcher's signals, gone with their parent, missed when dead."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from data_runs import Run, make_config, make_documents, write_jsonl

import torchtitan
from torchtitan.config import DataError


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_jsonl(tmp_path, make_documents(200))


def start(path: str, num_workers: int = 2) -> tuple[Run, list[int]]:
    before = set(active_children())
    run = Run(make_config(path, num_workers))
    run.step()
    return run, [process.pid or 0 for process in active_children() if process not in before]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_close_ends_them(path):
    run, pids = start(path)
    assert len(pids) == 2 and all(map(is_alive, pids))
    run.close()
    wait_until_gone(pids)


@pytest.mark.fault("F15")
def test_signals_of_the_launcher_do_not_reach_them(path):
    run, pids = start(path)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    for _ in range(30):
        run.step()
    assert all(map(is_alive, pids))
    run.close()
    wait_until_gone(pids)


def test_a_dead_one_is_reported(path):
    run, pids = start(path)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(DataError, match="a worker process died"):
        for _ in range(200):
            run.step()
    run.close()
    wait_until_gone(pids)


def test_python_ends_without_close(path, tmp_path):
    """Even while a reader is stuck, here because it is stopped."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folders=folders(), path=path, mode="leave"))
    done = subprocess.run([sys.executable, str(script)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.split()])


def folders() -> list[str]:
    return [str(Path(__file__).parent), str(Path(torchtitan.__file__).parents[1])]


PARENT = """
import os, signal, sys
sys.path[:0] = {folders!r}
from test_worker_processes import start
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    run, pids = start({path!r})
    print(*pids, flush=True)
    if {mode!r} == "leave":
        os.kill(pids[0], signal.SIGSTOP)
        sys.exit()
    if {mode!r} == "group":
        os.killpg(0, signal.SIGTERM)
        for _ in range(40):
            run.step()
        print("read on", flush=True)
    signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["kill", "group"])
def test_in_a_process_group(path, tmp_path, mode):
    """SIGTERM to the whole group leaves all reading; SIGKILL to the parent leaves nobody."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folders=folders(), path=path, mode=mode))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        if mode == "group":
            assert process.stdout.readline() == "read on\n"
            assert all(map(is_alive, pids))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_until_gone(pids)
