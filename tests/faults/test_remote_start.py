"""A start takes whole steps of an object store only, and refuses a store that it cannot use.

The real client (s3fs) talks to a server on this machine that holds damaged objects, or refuses.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.faults.storing import RUN_ID, config_of, make_step, prefix_of, upload_run
from tests.s3_server import BUCKET, S3Server
from torchtitan.checkpoint.manifest import read_manifest, verify_share
from torchtitan.checkpoint.remote_start import fetch_run
from torchtitan.checkpoint.steps_folder import committed_steps
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import remote as remote_checks
from torchtitan.utils import remote


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


def test_run_id_of_a_store_does_not_lead_out_of_the_folder(url: str, tmp_path: Path) -> None:
    run_id = "x/../../../planted"
    make_step(tmp_path / "run", 4, run_id=run_id)
    assert upload_run(url, tmp_path / "run", run_id) == ""
    with pytest.raises(ConfigError, match="holds no run id"):
        fetch_run(config_of(url, tmp_path / "new"))
    assert not list(tmp_path.glob("planted*"))


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
        "wildcard": config_of(f"{url}/lr[1]", run),
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
