"""The content of weights as one number, to notice that a path has come to hold others."""

from pathlib import Path

from torchtitan.checkpoint.base import digest_of_files
from torchtitan.distributed.context import DistributedContext

_SUFFIXES = (".safetensors", ".distcp", ".gguf", ".pth", ".pt")


def weights_digest(path: Path, world: DistributedContext) -> str:
    """Return the SHA-256 of the names and contents of the weight files in `path`.

    The same on every mesh; each rank reads a share of the files. All ranks must call it. Raises
    CheckpointError for files that cannot be read.
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix in _SUFFIXES]
    return digest_of_files(world, f"{path} cannot be read", files)
