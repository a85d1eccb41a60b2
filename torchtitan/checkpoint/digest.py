"""The content of weights as one number, to notice that a path has come to hold others."""

import hashlib
import json
from pathlib import Path

from torchtitan.checkpoint.collective import run_on_all_ranks
from torchtitan.checkpoint.manifest import record_of
from torchtitan.distributed.context import DistributedContext

_SUFFIXES = (".safetensors", ".distcp", ".gguf", ".pth", ".pt")


def weights_digest(path: Path, world: DistributedContext) -> str:
    """Return the SHA-256 of the names and contents of the weight files in `path`.

    The same on every mesh; each rank reads a share of the files. All ranks must call it. Raises
    CheckpointError for files that cannot be read.
    """

    def digests() -> dict[str, str]:
        files = [path] if path.is_file() else sorted(path.iterdir())
        files = [file for file in files if file.suffix in _SUFFIXES]
        own = files[world.rank :: world.world_size]
        return {file.name: record_of(file).sha256 for file in own}

    found = run_on_all_ranks(world, f"{path} cannot be read", digests)
    merged = sorted(item for part in world.gather_json(found) for item in part.items())
    return hashlib.sha256(json.dumps(merged).encode()).hexdigest()
