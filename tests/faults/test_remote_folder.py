"""Steps in an object store are whole or absent, whatever fails, and none is lost.

The real client (s3fs) talks to a server on this machine that fails requests at random, or refuses
them from some point on.
"""

import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults.storing import (
    FILES,
    RUN_ID,
    config_of,
    make_step,
    prefix_of,
    upload_run,
    whole_steps,
)
from tests.s3_server import S3Server
from torchtitan.checkpoint import remote as uploads
from torchtitan.checkpoint.decision import Decision
from torchtitan.checkpoint.lock import FolderLock
from torchtitan.checkpoint.manifest import read_manifest
from torchtitan.checkpoint.remote import Uploads, forget_later, remote_steps, upload_step
from torchtitan.checkpoint.remote_start import fetch_run
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.checkpoint.steps_folder import committed_steps
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import ConfigError
from torchtitan.config.schema import Checkpoint
from torchtitan.utils.remote import RemoteError, RemoteFolder


def upload(url: str, run: Path, step: int) -> bool:
    folder = run / "checkpoint" / f"step-{step}"
    return upload_step(RemoteFolder(url), folder, read_manifest(folder))


@pytest.mark.parametrize("seed", range(4))
def test_whole_or_absent_while_requests_fail(
    server: S3Server, url: str, tmp_path: Path, seed: int
) -> None:
    """Looked at after every request, deletions of retention included."""
    seen = set()

    def look(method: str, path: str) -> None:
        seen.add(tuple(whole_steps(server, url, tmp_path)))

    server.chance, server.random, server.after = 0.2, random.Random(seed), look
    for step in (1, 2, 3):
        make_step(tmp_path / "run", step)
        assert upload_run(url, tmp_path / "run", keep_latest_k=2) == ""
    server.good_again()
    assert whole_steps(server, url, tmp_path) == [2, 3]
    assert {(1, 2), (1, 2, 3), (2, 3)} <= seen, "the newer one is there before the older one goes"
    assert not [name for name in server.objects(prefix_of(url)) if "step-1" in name]
    assert not [name for name in server.objects(prefix_of(url)) if "uploading" in name]


def puts(server: S3Server) -> list[str]:
    return [path.rpartition("/")[2] for method, path in server.requests if method == "PUT"]


@pytest.mark.parametrize("again", [False, True], ids=["new", "trained-again"])
def test_interrupted_anywhere_and_resumed(
    server: S3Server, url: str, tmp_path: Path, again: bool
) -> None:
    """Ended after ever more requests. With `again` the store has the step as it was before the
    run went back and trained it again: names and sizes agree, and no byte of it may stay."""
    make_step(tmp_path / "old", 7, seed=1)
    wanted = make_step(tmp_path / "run", 7, seed=2)
    lengths = []
    for allowed in range(0, 60, 3 if again else 2):
        place = f"{url}/{allowed}"
        server.good_again()
        if again:
            upload(place, tmp_path / "old", 7)
        server.requests.clear()
        server.refuse = lambda method, path, n=allowed: 403 * (len(server.requests) > n)  # type: ignore[misc]
        try:
            upload(place, tmp_path / "run", 7)
        except RemoteError:
            ended = True
        else:
            ended = False
        arrived = [name for name in puts(server)[:-1] if name in FILES] if ended else []
        server.refuse = lambda method, path: 0
        whole_steps(server, place, tmp_path)
        server.requests.clear()
        upload(place, tmp_path / "run", 7)
        assert not set(arrived) & set(puts(server)), "what has arrived is not sent again"
        assert whole_steps(server, place, tmp_path) == [7]
        assert read_manifest(tmp_path / "seen" / "step-7") == wanted
        assert "uploading" not in str(list(server.objects(prefix_of(place))))
        lengths.append(len(arrived))
        if not ended:
            break
    assert max(lengths) >= len(FILES) - 1 and not ended


def test_newest_step_goes_first_and_later_ones_of_before_go(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        make_step(tmp_path / "run", step)
        upload_run(url, tmp_path / "run")
    for step in (20, 30):  # the run goes back to step 10
        shutil.rmtree(tmp_path / "run" / "checkpoint" / f"step-{step}")
    forget_later(Checkpoint(enable=True, remote_folder=url), RUN_ID, 10)
    assert whole_steps(server, url, tmp_path) == [10]
    make_step(tmp_path / "run", 15)
    make_step(tmp_path / "run", 18)
    upload_run(url, tmp_path / "run")
    assert whole_steps(server, url, tmp_path) == [10, 18]


def test_start_that_goes_back_forgets_later_steps_before_it_trains(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    """Otherwise a kill before the next upload would let the next start go on from them."""
    run = tmp_path / "run"
    for step in (10, 20):
        make_step(run, step)
        upload_run(url, run)
    decision = Decision("resume", RUN_ID, 10, 8, 8, load_step=10, asked_load_step=10)
    config = config_of(url, run, load_step=10, allow_rewind=True)
    folder = RunFolder(run, config, decision, None)
    folder.begin()
    assert remote_steps(server.objects(prefix_of(url))) == [10]
    assert folder.uploads is not None
    make_step(run, 15)
    shutil.rmtree(run / "checkpoint" / "step-20")
    assert folder.uploads.finish() == ""
    assert whole_steps(server, url, tmp_path) == [10, 15]


def test_later_steps_stay_where_the_one_here_is_damaged(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    """A run that fell back to an older step does not delete the good copy of the newer one."""
    run = tmp_path / "run"
    for step in (10, 20):
        make_step(run, step)
        upload_run(url, run)
    (run / "checkpoint" / "step-20").rename(run / "checkpoint" / "quarantine-step-20-0a")
    make_step(run, 15)
    assert upload_run(url, run) == ""
    assert whole_steps(server, url, tmp_path) == [10, 15, 20]
    fetch_run(config_of(url, run))
    assert committed_steps(run / "checkpoint", RUN_ID) == [10, 15, 20]


def test_what_no_step_needs_goes(server: S3Server, url: str, tmp_path: Path) -> None:
    """An upload that never ended, and ledgers that a later start has deleted here."""
    run = tmp_path / "run"
    (run / "ledger").mkdir(parents=True)
    (run / "ledger" / "step-0.rank-0.jsonl").write_text("{}")
    (run / "ledger" / "step-5.rank-0.jsonl").write_text("{}")
    make_step(run, 3)
    upload_run(url, run)  # and killed before the last request
    RemoteFolder(url).write("checkpoint/step-3/uploading.json", b"")
    make_step(run, 5)
    server.refuse = lambda method, path: 403 * (method == "PUT" and "step-5/__" in path)
    assert upload_run(url, run)
    server.good_again()
    (run / "ledger" / "step-5.rank-0.jsonl").unlink()
    make_step(run, 8)
    assert upload_run(url, run) == ""
    names = server.objects(prefix_of(url))
    assert not [name for name in names if "step-5" in name]
    assert "ledger/step-0.rank-0.jsonl" in names
    assert whole_steps(server, url, tmp_path) == [3, 8]


def test_mark_without_a_step_protects_nothing(server: S3Server, url: str, tmp_path: Path) -> None:
    """A machine that is lost during the first upload; without a step the run is a new one."""
    RemoteFolder(url).write("run_id", b"lost")
    assert fetch_run(config_of(url, tmp_path / "run")) == []
    make_step(tmp_path / "run", 5)
    assert upload_run(url, tmp_path / "run") == ""
    assert server.objects(prefix_of(url))["run_id"] == RUN_ID.encode()
    assert fetch_run(config_of(url, tmp_path / "run")) == []
    # Steps without a mark are somebody's: never a start from scratch.
    RemoteFolder(url).delete(["run_id"])
    with pytest.raises(ConfigError, match="holds steps, but not the file run_id"):
        fetch_run(config_of(url, tmp_path / "new"))


def test_folder_of_a_running_job_is_left_alone(server: S3Server, url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (4, 8):
        make_step(run, step)
        upload_run(url, run)
    shutil.rmtree(run / "checkpoint" / "step-8")
    lock = FolderLock(run)
    with pytest.raises(ConfigError, match="another job is using it"):
        fetch_run(config_of(url, run))
    assert fetch_run(config_of(url, run), is_main=False) == [], "its own rank 0 may hold it"
    assert committed_steps(run / "checkpoint", RUN_ID) == [4]
    lock.release()
    assert "Step 8" in fetch_run(config_of(url, run))[0]


def test_failure_is_reported_and_the_next_start_uploads(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    make_step(tmp_path / "run", 5)
    server.refuse = lambda method, path: 403 * (method == "PUT" and "distcp" in path)
    error = upload_run(url, tmp_path / "run")
    assert "AccessDenied" in error and url in error
    assert "the-secret" not in error
    server.good_again()
    assert upload_run(url, tmp_path / "run") == ""
    assert whole_steps(server, url, tmp_path) == [5]


def test_folder_that_cannot_be_listed_is_a_failure(
    server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the end of the thread, after which everything would seem to be uploaded."""
    make_step(tmp_path / "run", 5)
    listings = iter([[5]])

    def listed(folder: Path, run_id: str) -> list[int]:
        if (found := next(listings, None)) is None:
            raise OSError("stale file handle")
        return found

    monkeypatch.setattr(uploads, "committed_steps", listed)
    assert "stale file handle" in upload_run(url, tmp_path / "run")


def test_step_that_is_being_uploaded_is_not_deleted_here(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    """Even where retention would: a slow upload must come to its end."""
    arrived, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and "step-1/__0_0" in path:
            arrived.set()
            assert go_on.wait(60)

    server.after = hold
    section = Checkpoint(enable=True, remote_folder=url, keep_latest_k=2)
    make_step(tmp_path / "run", 1)
    running = Uploads(section, tmp_path / "run", RUN_ID)
    running.step_saved()
    assert arrived.wait(60)
    for step in (2, 3, 4):
        make_step(tmp_path / "run", step)
    folder = tmp_path / "run" / "checkpoint"
    store = SimpleNamespace(section=section, folder=folder, run_id=RUN_ID, protected_step=-1)
    store.on_site, store._uploading = lambda site, step: None, lambda: running.uploading
    CheckpointStore._delete_old(store, 4)  # type: ignore[arg-type]
    assert committed_steps(folder, RUN_ID) == [1, 3, 4]
    go_on.set()
    assert running.finish() == ""
    assert whole_steps(server, url, tmp_path) == [1, 4]


def test_another_run_is_left_alone(server: S3Server, url: str, tmp_path: Path) -> None:
    make_step(tmp_path / "run", 5)
    upload_run(url, tmp_path / "run")
    before = server.objects(prefix_of(url))
    make_step(tmp_path / "other", 5, run_id="other")
    assert f'belongs to run "{RUN_ID}"' in upload_run(url, tmp_path / "other", "other")
    assert server.objects(prefix_of(url)) == before
    with pytest.raises(ConfigError, match="belongs to run"):
        fetch_run(config_of(url, tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"job\.new_run cannot move aside"):
        fetch_run(config_of(url, tmp_path / "run", job={"new_run": True}))
