"""Ways in which a saved step can be damaged, by name: each takes its folder and changes it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from torchtitan.checkpoint import dcp_io, manifest


def truncate(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / name, keep((step / name).stat().st_size))


def flip(name: str, place: float) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        content = bytearray((step / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        (step / name).write_bytes(content)

    return damage


def resign(step: Path, /, **changes: Any) -> None:
    """Rewrite the manifest so that it fits the files as they are now: a skilled forger's work."""
    body = json.loads((step / "manifest.json").read_text())
    body.pop("digest")
    body.pop("format")
    old = manifest.manifest_from_json(body)
    files = {name: manifest.record_file(step / name) for name in old.files}
    parts = {**vars(old), "files": files, **changes}
    (step / "manifest.json").unlink()
    manifest.write_manifest(step, manifest.Manifest(**parts))


class Evil:
    """Unpickling it makes a file, the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


def signed_metadata(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        (step / ".metadata").write_bytes(content((step / ".metadata").read_bytes()))
        resign(step)

    return damage


def evil_metadata(step: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Evil(step.parent / "canary")))
    resign(step)


def evil_inside_metadata(step: Path) -> None:
    content = dcp_io.read_metadata(step)
    content.planner_data = Evil(step.parent / "canary")
    (step / ".metadata").write_bytes(pickle.dumps(content))
    resign(step)


def path_outside(step: Path) -> None:
    content = dcp_io.read_metadata(step)
    for info in content.storage_data.values():
        info.relative_path = f"../step-2/{info.relative_path}"
    (step / ".metadata").write_bytes(pickle.dumps(content))
    resign(step)


def pickled_entry(step: Path) -> None:
    content = dcp_io.read_metadata(step)
    name = next(iter(content.state_dict_metadata))
    content.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    (step / ".metadata").write_bytes(pickle.dumps(content))
    resign(step)


def forgotten_chunk(step: Path) -> None:
    content = dcp_io.read_metadata(step)
    content.storage_data.pop(next(iter(content.storage_data)))
    (step / ".metadata").write_bytes(pickle.dumps(content))
    resign(step)


def swap_with_previous(step: Path) -> None:
    shutil.copy(step.parent / "step-2" / "__1_0.distcp", step / "__1_0.distcp")


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        body = json.loads((step / "manifest.json").read_text())
        (step / "manifest.json").write_text(json.dumps({**body, **changes}))

    return damage


def climbing_name(step: Path) -> None:
    body = json.loads((step / "manifest.json").read_text())
    record = manifest.file_record(body["files"]["__1_0.distcp"])
    files = {"../step-2/__1_0.distcp": record}
    (step / "manifest.json").unlink()
    manifest.write_manifest(step, manifest.Manifest("abc123", 3, False, files, body["tensors"]))


def without_metadata(step: Path) -> None:
    files = {path.name: manifest.record_file(path) for path in step.glob("*.distcp")}
    (step / ".metadata").unlink()
    body = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").unlink()
    manifest.write_manifest(step, manifest.Manifest("abc123", 3, False, files, body["tensors"]))


def link_shard(step: Path) -> None:
    shutil.move(step / "__1_0.distcp", step.parent / "elsewhere")
    (step / "__1_0.distcp").symlink_to(step.parent / "elsewhere")


def other_step(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.parent / "step-1", step)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard-empty": truncate("__0_0.distcp", lambda size: 0),
    "shard-half": truncate("__1_0.distcp", lambda size: size // 2),
    "shard-one-byte-short": truncate("__1_0.distcp", lambda size: size - 1),
    "shard-bit-first": flip("__0_0.distcp", 0.0),
    "shard-bit-middle": flip("__1_0.distcp", 0.5),
    "shard-bit-last": flip("__0_0.distcp", 1.0),
    "shard-missing": lambda step: (step / "__1_0.distcp").unlink(),
    "shard-extra": lambda step: (step / "__2_0.distcp").write_bytes(b"x"),
    "shard-of-another-step": swap_with_previous,
    "shard-link": link_shard,
    "metadata-missing": lambda step: (step / ".metadata").unlink(),
    "metadata-empty": truncate(".metadata", lambda size: 0),
    "metadata-bit": flip(".metadata", 0.7),
    "metadata-half": signed_metadata(lambda content: content[: len(content) // 2]),
    "metadata-garbage": signed_metadata(lambda content: b"not a pickle"),
    "metadata-evil": evil_metadata,
    "metadata-evil-inside": evil_inside_metadata,
    "metadata-path-outside": path_outside,
    "metadata-pickled-entry": pickled_entry,
    "metadata-forgotten-chunk": forgotten_chunk,
    "manifest-missing": lambda step: (step / "manifest.json").unlink(),
    "manifest-half": truncate("manifest.json", lambda size: size // 2),
    "manifest-edited": edit_manifest(state={"step": 99}),
    "manifest-newer": edit_manifest(format=99),
    "manifest-climbing-name": climbing_name,
    "manifest-without-metadata": without_metadata,
    "manifest-not-an-object": lambda step: (step / "manifest.json").write_text("[1]"),
    "manifest-of-another-step": other_step,
}
