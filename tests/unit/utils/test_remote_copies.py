"""Copies of files in an object store are what the store holds, however often something failed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tests.s3_server import BUCKET, S3Server, s3_server
from torchtitan.config import ConfigError
from torchtitan.config.schema import Data, Training
from torchtitan.data.registry import build_source
from torchtitan.utils import remote
from torchtitan.utils.remote import RemoteError, RemoteFolder, local_copy, url_of_copy
from torchtitan.weights.remote import download


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def url(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with three files, of this test alone; the cache is empty."""
    server.good_again()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    folder = f"{BUCKET}/{tmp_path.name}"
    for name in ("a.jsonl", "b.jsonl", "in/c.jsonl", "in/d.md"):
        fsspec.filesystem("s3").pipe_file(f"{folder}/{name}", name.encode() * 100)
    server.requests.clear()
    return f"s3://{folder}"


def content(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def downloads(server: S3Server) -> list[str]:
    found = [p for m, p in server.requests if m == "GET" and p.endswith(("jsonl", "md"))]
    server.requests.clear()
    return found


def test_copy_follows_the_store(server: S3Server, url: str) -> None:
    store = fsspec.filesystem("s3")
    copy = local_copy(url)
    names = "a.jsonl", "b.jsonl", "in/c.jsonl", "in/d.md"
    assert content(copy) == {name: name.encode() * 100 for name in names}
    assert url_of_copy(copy / "in") == f"{url}/in"
    assert url_of_copy(Path.cwd()) is None
    server.requests.clear()
    assert local_copy(url) == copy and downloads(server) == []
    store.pipe_file(f"{url}/a.jsonl", b"A.JSONL" * 100)  # of the same size
    store.rm_file(f"{url}/in/c.jsonl")
    assert content(local_copy(url)).keys() == {"a.jsonl", "b.jsonl", "in/d.md"}
    assert (copy / "a.jsonl").read_bytes() == b"A.JSONL" * 100
    assert [path.rpartition("/")[2] for path in downloads(server)] == ["a.jsonl"]
    (copy / "b.jsonl").write_bytes(b"b.jsonL" * 100)  # somebody writes to the cache
    local_copy(url)
    assert (copy / "b.jsonl").read_bytes() == b"b.jsonl" * 100


def test_a_file_and_a_glob(server: S3Server, url: str) -> None:
    assert local_copy(f"{url}/in/c.jsonl").read_bytes() == b"in/c.jsonl" * 100
    copy = local_copy(f"{url}/**/*.jsonl")
    assert str(copy).endswith("/**/*.jsonl")
    root = Path(str(copy).removesuffix("/**/*.jsonl"))
    assert content(root).keys() == {"a.jsonl", "b.jsonl", "in/c.jsonl"}
    fsspec.filesystem("s3").rm_file(f"{url}/b.jsonl")
    local_copy(f"{url}/**/*.jsonl")
    assert content(root).keys() == {"a.jsonl", "in/c.jsonl"}
    with pytest.raises(RemoteError, match="holds no file") as caught:
        local_copy(f"{url}/*.parquet")
    assert caught.value.missing


def test_interrupted_copy_goes_on(server: S3Server, url: str) -> None:
    server.refuse = lambda method, path: 403 * (method == "GET" and path.endswith("b.jsonl"))
    with pytest.raises(RemoteError, match=r"cannot be read \(b\.jsonl\): AccessDenied"):
        local_copy(url)
    server.good_again()
    server.chance = 0.3
    copy = local_copy(url)
    server.chance = 0.0
    assert len(content(copy)) == 4
    assert {path.rpartition("/")[2] for path in downloads(server)} == {"b.jsonl"}


def test_processes_of_a_machine_download_once(server: S3Server, url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        copies = set(pool.map(lambda _: local_copy(url), range(6)))
    assert len(copies) == 1 and len(downloads(server)) == 4


def test_process_that_waited_gets_what_it_wants(
    server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check, which needs no weights, may have held the lock."""
    copy = local_copy(url, lambda name: name == "a.jsonl")
    monkeypatch.setattr(remote.time, "time", lambda: 0.0)  # the second one began before
    local_copy(url, lambda name: "/" not in name)
    assert content(copy).keys() == {"a.jsonl", "b.jsonl"}


def test_weights_that_are_still_uploaded_are_refused(server: S3Server, url: str) -> None:
    """Without the manifest they would pass for another program's, which nothing verifies."""
    fsspec.filesystem("s3").pipe_file(f"{url}/uploading.json", b"{}")
    with pytest.raises(ConfigError, match="not been uploaded completely"):
        download(url)
    fsspec.filesystem("s3").rm_file(f"{url}/uploading.json")
    assert (download(url) / "a.jsonl").exists()


def test_data_that_are_not_there_are_named(server: S3Server, url: str) -> None:
    def problem(path: str) -> str:
        with pytest.raises(ConfigError) as caught:
            build_source(Training(dataset="auto", dataset_path=path), Data())
        (issue,) = caught.value.problems
        return f"{issue.key} {issue.problem}"

    assert "training.dataset_path" in problem(f"{url}/none")
    assert "holds no file" in problem(f"{url}/none")
    assert "bucket does not exist" in problem("s3://no-such-bucket/data")
    assert "Protocol not known: s4" in problem("s4://bucket/data")
    assert "an empty part" in problem(f"s3://{BUCKET}/../../etc")
    server.refuse = lambda method, path: 403
    assert "AccessDenied" in problem(url)


@pytest.mark.parametrize("name", ["../../../../planted.jsonl", "in/../../planted.jsonl", "a\0b"])
def test_names_of_objects_do_not_lead_out_of_the_cache(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A store may hold objects of any name, written by whoever may write to the bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = RemoteFolder(url)
    planted = {**folder._fs.find(folder._root, detail=True)}
    planted[f"{folder._root}/{name}"] = {"type": "file", "size": 1}
    monkeypatch.setattr(folder._fs, "find", lambda path, detail: planted)
    with pytest.raises(RemoteError, match="no name of a file"):
        local_copy(url)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.jsonl"))


def test_url_opens_no_second_file_system() -> None:
    with pytest.raises(RemoteError, match="::"):
        RemoteFolder("reference://a::/tmp/planted.json")


def test_copy_that_does_not_fit_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: type("", (), {"free": 10}))
    with pytest.raises(RemoteError, match=r"needs 3\.0 KiB, and 10 bytes are free"):
        local_copy(url)


def test_failures_are_repeated_and_refusals_are_not(server: S3Server, url: str) -> None:
    for status, tries in ((500, remote._ATTEMPTS), (403, 1)):
        server.requests.clear()
        server.refuse = lambda method, path, status=status: status  # type: ignore[misc]
        with pytest.raises(RemoteError):
            RemoteFolder(url).write("x", b"1")
        assert len(server.requests) == tries
