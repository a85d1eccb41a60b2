"""Weights of the hub (`hf://owner/name[@revision]`) or in an object store. No torch."""

from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.utils.remote import RemoteError, is_remote, local_copy, url_of_copy
from torchtitan.weights import hub
from torchtitan.weights.description import KEY

_LARGE = (".safetensors", ".distcp", ".pth", ".pt", ".bin")
_MANIFEST, _UPLOADING, _TOKENIZER = "manifest.json", "uploading.json", "tokenizer"


def download(path: str, with_weights: bool = True) -> Path:
    """Return the local copy of weights, after downloading what is missing.

    Of a folder in a store all files are taken, but no folders in it; of a step also its run's
    tokenizer. Without `with_weights` the files that describe them are there. Raises `ConfigError`.
    """
    if hub.is_hub_path(path):
        return hub.download(path, with_weights)
    try:
        copy = local_copy(
            path.rstrip("/"),
            lambda name: "/" not in name and (with_weights or not name.endswith(_LARGE)),
        )
        if (copy / _MANIFEST).is_file():
            _add_tokenizer(path.rstrip("/"))
        elif (copy / _UPLOADING).is_file():
            raise RemoteError(f"{path} has not been uploaded completely")
    except RemoteError as error:
        fix = "check the path, the credentials and the network"
        raise ConfigError(ConfigIssue(KEY, str(error), fix, path)) from error
    return copy


def local_path(given: str) -> Path:
    """Return a path on this machine, of a copy if `given` is elsewhere. Raises `ConfigError`."""
    return download(given) if is_remote(given) else Path(given)


def download_once(path: str) -> Path:
    """Return the copy; of a commit of the hub without asking, if it is whole."""
    return hub.download_once(path) if hub.is_hub_path(path) else download(path)


def place_of(folder: Path) -> str | None:
    """Return the `hf://owner/name@commit` or URL that a folder is a copy of; None for others."""
    return hub.hub_path_of(folder) or url_of_copy(folder)


def _add_tokenizer(step: str) -> None:
    """Download the copy of the tokenizer that a run keeps next to the folder of its steps."""
    run = step.rsplit("/", 2)[0]
    try:
        local_copy(f"{run}/{_TOKENIZER}")
    except RemoteError as error:
        if not error.missing:
            raise
