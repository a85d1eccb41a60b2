"""Steps in an object store are whole or absent, whatever fails; a start takes only whole ones.

The real client (s3fs) talks to a server on this machine that fails requests at random, refuses them
from some point on, or holds damaged objects.
"""

import hashlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from tests.s3_server import BUCKET, S3Server, s3_server
from torchtitan.checkpoint import remote as uploads
from torchtitan.checkpoint.decision import Decision
from torchtitan.checkpoint.lock import FolderLock
from torchtitan.checkpoint.manifest import (
    Manifest,
    read_manifest,
    record_file,
    verify_share,
    write_manifest,
)
from torchtitan.checkpoint.remote import Uploads, forget_later, remote_steps, upload_step
from torchtitan.checkpoint.remote_start import fetch_run
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.checkpoint.steps_folder import committed_steps
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.preflight import remote as remote_checks
from torchtitan.utils import remote
from torchtitan.utils.remote import RemoteError, RemoteFolder

RUN_ID = "abc123"
FILES = {".metadata": 300, "__0_0.distcp": 5000, "__1_0.distcp": 7000, "__2_0.distcp": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of this test alone."""
    server.good_again()
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(uploads, "_AGAIN_SECONDS", 0.01)
    return f"s3://{BUCKET}/{hashlib.sha1(request.node.name.encode()).hexdigest()[:8]}"


def prefix_of(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/") + "/"


def make_step(run: Path, step: int, seed: int | None = None, run_id: str = RUN_ID) -> Manifest:
    """Write a step of random bytes; its sizes do not depend on the seed."""
    generator = random.Random(step if seed is None else seed)
    folder = run / "checkpoint" / f"step-{step}"
    folder.mkdir(parents=True)
    records = {}
    for name, size in FILES.items():
        content = generator.randbytes(size)
        (folder / name).write_bytes(content)
        records[name] = record_file(folder / name)
    write_manifest(folder, Manifest(run_id, step, False, records, {}, {"step": step}))
    return read_manifest(folder)


def upload(url: str, run: Path, step: int) -> bool:
    folder = run / "checkpoint" / f"step-{step}"
    return upload_step(RemoteFolder(url), folder, read_manifest(folder))


def upload_run(url: str, run: Path, run_id: str = RUN_ID, **section: object) -> str:
    """Upload the newest step, as the end of a job does."""
    settings = Checkpoint(enable=True, remote_folder=url, **section)  # type: ignore[arg-type]
    return Uploads(settings, run, run_id).finish()


def whole_steps(server: S3Server, url: str, tmp_path: Path) -> list[int]:
    """Return the committed steps of the store, each compared with its manifest."""
    prefix = prefix_of(url)
    objects = server.objects(prefix)
    steps = remote_steps(objects)
    for step in steps:
        place = f"checkpoint/step-{step}/"
        folder = tmp_path / "seen" / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in objects.items():
            if name.startswith(place):
                (folder / name.removeprefix(place)).write_bytes(content)
        verify_share(folder, read_manifest(folder), 0, 1)
    return steps


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


# --- a start from there ---------------------------------------------------------------------------


def config_of(
    url: str, run: Path, job: dict[str, object] | None = None, **section: object
) -> JobConfig:
    return JobConfig.model_validate(
        {
            "job": {"dump_folder": str(run), **(job or {})},
            "checkpoint": {"enable": True, "remote_folder": url, **section},
        }
    )


def two_steps(url: str, tmp_path: Path) -> Path:
    """A run whose steps 4 and 8 are in the store, with what else a start needs."""
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    (run / "ledger").mkdir()
    (run / "ledger" / "step-0.rank-0.jsonl").write_text("{}")
    for step in (4, 8):
        make_step(run, step)
        (run / "metrics.jsonl").write_text(f"up to step {step}")
        upload_run(url, run)
    return run


Damage = Callable[[dict[str, bytes]], dict[str, bytes | None]]
"""Gets the objects of a step; returns new contents by name, None to delete one."""


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


DAMAGES: dict[str, Damage] = {
    "flipped": lambda of: {"__1_0.distcp": flipped(of["__1_0.distcp"])},
    "truncated": lambda of: {"__1_0.distcp": of["__1_0.distcp"][:-1]},
    "emptied": lambda of: {".metadata": b""},
    "missing": lambda of: {"__0_0.distcp": None},
    "manifest-changed": lambda of: {"manifest.json": of["manifest.json"].replace(b"8", b"9")},
    "manifest-truncated": lambda of: {"manifest.json": of["manifest.json"][:200]},
    "manifest-missing": lambda of: {"manifest.json": None},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_step_is_noticed(
    server: S3Server, url: str, tmp_path: Path, damage: Damage
) -> None:
    two_steps(url, tmp_path)
    store, place = fsspec.filesystem("s3"), f"{BUCKET}/{prefix_of(url)}checkpoint/step-8/"
    changed = damage(server.objects(f"{prefix_of(url)}checkpoint/step-8/"))
    for name, content in changed.items():
        store.rm_file(place + name) if content is None else store.pipe_file(place + name, content)
    notices = fetch_run(config_of(url, tmp_path / "new"))
    assert committed_steps(tmp_path / "new" / "checkpoint", RUN_ID) == [4]
    if changed != {"manifest.json": None}:  # without it there is no step
        assert "CHECKPOINT DAMAGED" in notices[0] and "step-8" in notices[0]
    step = tmp_path / "new" / "checkpoint" / "step-4"
    verify_share(step, read_manifest(step), 0, 1)


def test_nothing_good_is_an_error(server: S3Server, url: str, tmp_path: Path) -> None:
    """A run never starts from scratch silently."""
    two_steps(url, tmp_path)
    for step in (4, 8):
        fsspec.filesystem("s3").rm_file(f"{url}/checkpoint/step-{step}/__0_0.distcp")
    with pytest.raises(ConfigError, match=r"no step that can be used: .*step-8.*step-4"):
        fetch_run(config_of(url, tmp_path / "new"))
    assert committed_steps(tmp_path / "new" / "checkpoint", RUN_ID) == []


def test_new_machine_gets_the_newest_step_and_the_run_s_files(
    server: S3Server, url: str, tmp_path: Path
) -> None:
    run, new = two_steps(url, tmp_path), tmp_path / "new"
    server.chance = 0.2
    notices = fetch_run(config_of(url, new))
    server.good_again()
    assert "Step 8" in notices[0]
    assert committed_steps(new / "checkpoint", RUN_ID) == [8]
    verify_share(new / "checkpoint/step-8", read_manifest(new / "checkpoint/step-8"), 0, 1)
    for name in ("metrics.jsonl", "tokenizer/tokenizer.json", "ledger/step-0.rank-0.jsonl"):
        assert (new / name).read_bytes() == (run / name).read_bytes()
    # A step to go back to comes along.
    fetch_run(config_of(url, tmp_path / "back", load_step=4))
    assert committed_steps(tmp_path / "back" / "checkpoint", RUN_ID) == [4, 8]


def test_run_folder_is_only_completed(server: S3Server, url: str, tmp_path: Path) -> None:
    """One with the newest step is left alone; an older one gets what another machine trained."""
    run = two_steps(url, tmp_path)
    shutil.copytree(run, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoint" / "step-8")
    (tmp_path / "old" / "metrics.jsonl").write_text("up to step 5")
    (run / "metrics.jsonl").write_text("up to step 9")
    assert fetch_run(config_of(url, run)) == []
    assert (run / "metrics.jsonl").read_text() == "up to step 9"
    assert "Step 8" in fetch_run(config_of(url, tmp_path / "old"))[0]
    assert committed_steps(tmp_path / "old" / "checkpoint", RUN_ID) == [4, 8]
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == "up to step 8"


def test_interrupted_download_continues(server: S3Server, url: str, tmp_path: Path) -> None:
    two_steps(url, tmp_path)
    new = tmp_path / "new"
    server.refuse = lambda method, path: 403 * path.endswith("step-8/__1_0.distcp")
    with pytest.raises(ConfigError, match="AccessDenied"):
        fetch_run(config_of(url, new))
    assert committed_steps(new / "checkpoint", RUN_ID) == []
    server.good_again()
    fetch_run(config_of(url, new))
    assert committed_steps(new / "checkpoint", RUN_ID) == [8]
    assert not [p for m, p in server.requests if m == "GET" and p.endswith("step-8/__0_0.distcp")]


# --- refusals -------------------------------------------------------------------------------------


def check(config: JobConfig, full: bool = True) -> list[str]:
    context = RunContext(config, 1, "cpu", full)
    found = remote_checks.check_static(context) or remote_checks.check_environment(context)
    return [f"{issue.key}: {issue}" for issue in found]


def test_access_is_checked_before_the_start(
    server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert check(config_of(url, run)) == []
    assert server.objects(prefix_of(url)) == {}, "nothing stays"
    for text, config in {
        "bucket does not exist": config_of("s3://no-such-bucket/run", run),
        "is not a URL": config_of("bucket/run", run),
        "empty part": config_of("s3://bucket//run", run),
        "checkpoint.enable is false": config_of(url, run, enable=False),
        "Protocol not known": config_of("nfs4://bucket/run", run),
        "gcsfs": config_of("gs://bucket/run", run),
    }.items():
        (issue,) = check(config)
        assert issue.startswith("checkpoint.remote_folder") and text in issue
    server.refuse = lambda method, path: 403 * (method == "PUT")
    assert "AccessDenied" in check(config_of(url, run))[0]
    server.refuse = lambda method, path: 403
    with pytest.raises(ConfigError, match="Forbidden"):
        fetch_run(config_of(url, run))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    with pytest.raises(ConfigError, match="Could not connect"):
        fetch_run(config_of(url, run))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "credentials" in check(config_of(url, run))[0]
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert not (run / "checkpoint").exists()
