"""`torchtitan upload` with the real library, to a server that answers as the hub does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.cli_server import CliServer, Result
from tests.unit.commands.test_download import variables
from tests.unit.hub_server import Hub, Repository

WRITER, READER = "writersecret1234", "readersecret1234"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
WITHOUT_TOKEN = {"HF_TOKEN": ""}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({}, tokens=(READER,), writers=(WRITER,)) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(hub: Hub) -> None:
    hub.repositories.clear()
    hub.blobs.clear()
    hub.refusals.clear()
    for log in (hub.cuts, hub.sent, hub.commits):
        log.clear()


def server(hub: Hub, home: Path, **more: str) -> Iterator[CliServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
        for name, value in variables(home, **own).items():
            patch.setenv(name, value)
        started = CliServer("--without-pauses")
    yield started
    started.close()


@pytest.fixture(scope="module")
def cli(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliServer]:
    """Large files over plain HTTP, to a store that this server has."""
    yield from server(hub, tmp_path_factory.mktemp("home"), HF_HUB_DISABLE_XET="1")


@pytest.fixture(scope="module")
def xet(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliServer]:
    """As installed: large files go to Xet, whose store this server does not have."""
    yield from server(hub, tmp_path_factory.mktemp("home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an export writes it, in two shards."""
    path = tmp_path / "model"
    path.mkdir()
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": np.full((300, 100), number, dtype="f4")}, path / name)
    weight_map = {f"w{number}": name for number, name in enumerate(SHARDS)}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "README.md").write_text("---\ntags:\n- torchtitan\n---\n\n# A model\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def upload(cli: CliServer, folder: Path, *words: str, **environment: str) -> Result:
    result = cli.run("upload", str(folder), *words, **{"HF_TOKEN": WRITER, **environment})
    assert "Traceback" not in result.stderr and "secret1234" not in result.stderr
    return result


def sent(hub: Hub, part: str) -> int:
    return sum(part in path for path, _ in hub.sent)


@pytest.mark.parametrize("words", [(), ("--public",)], ids=["private", "public"])
def test_a_new_repository(cli: CliServer, hub: Hub, folder: Path, words: tuple[str, ...]) -> None:
    result = upload(cli, folder, "mine/new", "--message=First", *words)
    assert result.status == 0, result.stderr
    assert result.stdout.startswith(f"{hub.url}/mine/new/commit/")
    assert hub.repositories["mine/new"].private == (not words)
    assert hub.repositories["mine/new"].files == contents(folder)
    assert hub.commits == ["First"]
    # The same again: nothing is sent, nothing changes.
    assert upload(cli, folder, "mine/new", *words).status == 0
    assert sent(hub, "/blobs/") == 4 and hub.commits == ["First"]


def test_what_everybody_may_read_is_asked_for(cli: CliServer, hub: Hub, folder: Path) -> None:
    hub.repositories["mine/open"] = Repository()
    result = upload(cli, folder, "mine/open")
    assert result.status == 2 and "exists, and everybody may read it" in result.stderr
    assert not hub.commits and not hub.blobs
    assert upload(cli, folder, "mine/open", "--public").status == 0 and hub.commits


def test_no_shards_of_an_earlier_upload_stay(cli: CliServer, hub: Hub, folder: Path) -> None:
    old = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old"}
    hub.repositories["mine/old"] = Repository({**old, "notes.txt": b"mine"}, private=True)
    assert upload(cli, folder, "mine/old").status == 0
    assert hub.repositories["mine/old"].files == {**contents(folder), "notes.txt": b"mine"}


def test_a_connection_that_is_lost_once(cli: CliServer, hub: Hub, folder: Path) -> None:
    hub.cuts = [("/blobs/", 5000)]
    assert upload(cli, folder, "mine/new").status == 0
    assert hub.repositories["mine/new"].files == contents(folder)


def test_an_interrupted_upload_continues(cli: CliServer, hub: Hub, folder: Path) -> None:
    from hashlib import sha256

    first, second = (sha256((folder / name).read_bytes()).hexdigest() for name in SHARDS)
    hub.cuts = [(f"/blobs/{second}", 5000)] * 20
    result = upload(cli, folder, "mine/new")
    assert result.status == 4, result.stderr
    assert f"{hub.url} cannot be reached" in result.stderr
    assert "the same command continues" in result.stderr
    assert list(hub.blobs) == [first] and not hub.repositories["mine/new"].files
    hub.cuts.clear()
    hub.sent.clear()
    assert upload(cli, folder, "mine/new").status == 0
    assert hub.repositories["mine/new"].files == contents(folder)
    assert not sent(hub, f"/blobs/{first}") and sent(hub, f"/blobs/{second}") == 2


REFUSED: dict[str, tuple[dict[str, tuple[int, str]], dict[str, str], str]] = {
    "no token": ({}, WITHOUT_TOKEN, "needs a token that may write it. Fix: set HF_TOKEN, or run"),
    "a wrong token": ({}, {"HF_TOKEN": "expiredsecret1234"}, "the hub does not accept the token"),
    "a token that reads": (
        {},
        {"HF_TOKEN": READER},
        "does not grant access (You don't have the rights to write here). Fix: give it the right to"
        " write to mine/new",
    ),
    "no right to commit": ({"/commit/": (403, "Read-only")}, {}, "grant access (Read-only)"),
    "a commit meanwhile": (
        {"/commit/": (409, "A commit has happened since")},
        {},
        "somebody else has changed the repository meanwhile (A commit has happened since)",
    ),
    "no space": ({"/lfs/": (403, "Storage limit reached")}, {}, "(Storage limit reached)"),
    "store": ({"/blobs/": (400, "Expired")}, {}, "the hub answered with status 400 (Expired)"),
    "trouble": ({"/preupload/": (500, "")}, {}, "the hub answered with status 500"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses(cli: CliServer, hub: Hub, folder: Path, case: str) -> None:
    hub.refusals, environment, text = REFUSED[case]
    hub.repositories["mine/new"] = Repository(private=True)
    result = upload(cli, folder, "mine/new", **environment)
    assert result.status == (2 if environment else 4) and text in result.stderr, result.stderr
    assert "mine/new" in result.stderr and not hub.commits
    hub.refusals = {}
    assert upload(cli, folder, "mine/new").status == 0
    assert hub.repositories["mine/new"].files == contents(folder)


def test_names_and_revisions(cli: CliServer, hub: Hub, folder: Path) -> None:
    assert "is not a repository name" in upload(cli, folder, "a/b/c").stderr
    result = upload(cli, folder, "mine/new", "--revision=v9")
    assert '--revision = "v9": mine/new has no branch' in result.stderr and not hub.commits


def test_with_the_installed_store(xet: CliServer, hub: Hub, folder: Path) -> None:
    for name in SHARDS:
        (folder / name).unlink()
    (folder / INDEX).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF and the rest")
    result = upload(xet, folder, "mine/new")
    assert result.status == 0, result.stderr
    assert hub.repositories["mine/new"].files == contents(folder)
    save_file({"a": np.zeros(3, dtype="f4")}, folder / "model.safetensors")
    hub.refusals = {"/xet-write-token/": (403, "Not yours")}
    result = upload(xet, folder, "mine/new")
    assert result.status == 4 and "403 Forbidden" in result.stderr and len(hub.commits) == 1


def test_offline_and_without_a_network(
    hub: Hub, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cases = {
        "HF_HUB_OFFLINE: is set, which forbids uploads": {"HF_HUB_OFFLINE": "1"},
        "http://127.0.0.1:9 cannot be reached": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    }
    (folder / "adapter_config.json").write_text("{}")  # not looked into, which takes torch
    for text, variable in cases.items():
        for cli in server(hub, tmp_path, **variable):
            result = upload(cli, folder, "mine/new")
            assert result.status == 2 and text in result.stderr, result.stderr
    assert not hub.sent


def cut_off(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-100])


def as_step(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def only_text(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != "README.md":
            file.unlink()


PARTIAL: dict[str, tuple[Any, str]] = {
    "a shard is missing": (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]}: is missing"),
    "a shard is cut off": (cut_off, f"{SHARDS[1]}: cannot be read"),
    "no index": (lambda f: (f / INDEX).unlink(), "one is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "a step": (as_step, "export it first: torchtitan export"),
    "no model": (only_text, "holds no model"),
    "gone": (lambda f: f.rename(f.with_name("elsewhere")), "does not exist"),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_what_is_no_whole_model(cli: CliServer, hub: Hub, folder: Path, case: str) -> None:
    change, text = PARTIAL[case]
    change(folder)
    result = upload(cli, folder, "mine/new")
    assert result.status == 2 and text in result.stderr and "FOLDER = " in result.stderr
    assert not hub.sent
