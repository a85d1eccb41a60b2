"""Manifests: the digests of this format and of the one before."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.folders import plant_step
from torchtitan.checkpoint.base import digest_here, digest_of_manifest
from torchtitan.checkpoint.base_place import MovedBase, place_of_base
from torchtitan.checkpoint.manifest import (
    FileRecord,
    InvalidCheckpoint,
    damaged_files,
    read_manifest,
    record_file,
    verify_file,
)


def with_entry(folder: Path, **entry: Any) -> Path:
    """Plant a step, and sign a manifest with another entry for its file; return the step."""
    plant_step(folder, 3, "run")
    step = folder / "checkpoint" / "step-3"
    body = json.loads((step / "manifest.json").read_text())
    body |= {"format": 1, "files": {"__0_0.distcp": {"size": 7} | entry}}
    del body["digest"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    signed = body | {"digest": hashlib.sha256(text.encode()).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(signed))
    return step


def test_a_step_of_an_older_release(tmp_path: Path) -> None:
    step = with_entry(tmp_path, sha256=hashlib.sha256(b"tensors").hexdigest())
    manifest, file = read_manifest(step), step / "__0_0.distcp"
    verify_file(file, manifest.files[file.name])
    # Adapters have recorded the digest of such a base, which is that of the files themselves.
    assert digest_of_manifest(manifest) == digest_here([file])
    file.write_text("tensorS")
    with pytest.raises(InvalidCheckpoint, match="content differs"):
        verify_file(file, manifest.files[file.name])


@pytest.mark.parametrize("entry", [{"digest": "md5:00"}, {"digest": 7}, {"crc": "00"}, {}])
def test_a_digest_that_nobody_knows(tmp_path: Path, entry: dict[str, Any]) -> None:
    step = with_entry(tmp_path, **entry)
    with pytest.raises(InvalidCheckpoint, match=r"manifest\.json: (lacks a part|the entry of)"):
        read_manifest(step)


def test_every_damaged_file_is_found(tmp_path: Path) -> None:
    files: dict[Path, FileRecord] = {}
    for number in range(9):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes([number]) * 100_000)
        files[path] = record_file(path)
    (tmp_path / "3").write_bytes(b"\3" * 99_999 + b"x")
    (tmp_path / "5").unlink()
    sizes: list[int] = []
    faults = damaged_files(files, sizes.append)
    assert sorted(path.name for path in faults) == ["3", "5"]
    assert sum(sizes) == 8 * 100_000


def test_ctrl_c_ends_the_reading(tmp_path: Path) -> None:
    """As soon as one file ends it, another one is not read any further."""
    files = {}
    for name in ("first", "other"):
        (tmp_path / name).write_bytes(bytes(64 * 2**20 if name == "other" else 1))
        files[tmp_path / name] = record_file(tmp_path / name)
    chunks: list[int] = []

    def interrupt(num_bytes: int) -> None:
        if num_bytes == 1:
            raise KeyboardInterrupt
        chunks.append(num_bytes)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        damaged_files(files, interrupt)
    assert len(chunks) < 16


@pytest.mark.parametrize("url", ["http://host/base", "sftp://host/base", "reference://a::b"])
def test_checkpoint_chooses_no_other_servers_than_stores(url: str) -> None:
    """The user may; a checkpoint comes from anybody."""
    recorded = {"path": "/gone", "digest": "0"}
    assert place_of_base({**recorded, "hub": url}, MovedBase()) is None
    assert place_of_base({**recorded, "hub": url}, MovedBase("--base", url)) == url
    stored = "s3://bucket/base"
    assert place_of_base({**recorded, "hub": stored}, MovedBase()) == stored
