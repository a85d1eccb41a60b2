"""The base of a run: frozen weights that its checkpoints refer to instead of holding them.

A checkpoint records the path of the base and a digest of its content, by which a base that was
changed, or is another one, is recognised before anything is loaded.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from torchtitan.checkpoint.collective import run_on_all_ranks
from torchtitan.checkpoint.manifest import Manifest, sha256_of
from torchtitan.distributed.context import DistributedContext

_SUFFIXES = (".safetensors", ".distcp", ".gguf", ".pth", ".pt")


def digest_of_manifest(manifest: Manifest) -> str:
    """Return the digest of the files of a step, which the manifest vouches for."""
    files = manifest.files.items()
    # Without the prefix: older checkpoints of adapters have recorded bare hexadecimal digits.
    return _digest({name: (each.size, each.digest.partition(":")[2]) for name, each in files})


def digest_of_files(world: DistributedContext, what: str, files: Iterable[Path]) -> str:
    """Read every file, each rank its share, and return the digest of all. Collective."""

    def read() -> dict[str, tuple[int, str]]:
        by_size = sorted(files, key=lambda file: (-file.stat().st_size, file.name))
        return {file.name: sha256_of(file) for file in by_size[world.rank :: world.world_size]}

    listed = run_on_all_ranks(world, what, read)
    return _digest(
        {name: entry for part in world.gather_json(listed) for name, entry in part.items()}
    )


def digest_here(files: Iterable[Path]) -> str:
    """Return the digest of all files, read by this process alone."""
    return _digest({file.name: sha256_of(file) for file in files})


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights in the folder `path`, or the file `path`."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in files if file.suffix in _SUFFIXES]


def weights_digest(path: Path, world: DistributedContext) -> str:
    """Return the SHA-256 of the names and contents of the weight files in `path`.

    The same on every mesh; each rank reads a share of the files. All ranks must call it. Raises
    CheckpointError for files that cannot be read.
    """
    return digest_of_files(world, f"{path} cannot be read", weight_files(path))


def without_base(
    tensors: Mapping[str, Tensor], parts: Sequence[nn.Module], added: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors of the model that are trained, or `added`: what no base has."""
    named = (pair for part in parts for pair in part.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: t for name, t in tensors.items() if name in added or name not in frozen}


def _digest(files: Mapping[str, Sequence[int | str]]) -> str:
    """Return the digest of sizes and digests of files by name."""
    listed = sorted((name, *entry) for name, entry in files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
