"""`torchtitan upload`: a model's folder to the Hugging Face hub."""

import argparse
import sys
from pathlib import Path
from typing import Any

from torchtitan.config.errors import CheckpointError, ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.weights.hub import Asked
from torchtitan.weights.recognise import InvalidWeights, kind_of

_ADAPTER = "adapter_config.json"
_OLD_WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
"""Files of an earlier upload, which would lie next to the new ones if their number differs."""


def run(options: argparse.Namespace) -> int:
    """Make the repository if there is none, and upload; exit status 0. Raises ConfigError.

    Raises CheckpointError if the upload does not end; then nothing of it counts.
    """
    folder = Path(expand_path(options.folder))
    is_whole = _check_folder(folder)
    from huggingface_hub import create_repo, model_info, upload_folder

    keys = ("OWNER/NAME", "--revision", "FOLDER")
    asked = Asked(options.repo_id, options.revision, None, *keys, access="write")
    private = not options.public
    asked.ask(lambda where: create_repo(where["repo_id"], private=private, exist_ok=True))
    if private and not asked.ask(lambda where: model_info(where["repo_id"], timeout=30)).private:
        text, fix = "exists, and everybody may read it", "add --public if that is meant"
        raise ConfigError(ConfigIssue("OWNER/NAME", text, fix, options.repo_id))
    more: dict[str, Any] = {"delete_patterns": _OLD_WEIGHTS} if is_whole else {}
    message = options.message or f"Upload {folder.name}"
    print(f"uploading {folder} to {options.repo_id}", file=sys.stderr, flush=True)
    try:
        commit = asked.ask(
            lambda where: upload_folder(folder_path=folder, commit_message=message, **where, **more)
        )
    except ConfigError as error:  # the repository is there by now
        raise CheckpointError(f"{folder} was not uploaded: {error}") from error
    print(commit.commit_url)
    return DONE


def _check_folder(folder: Path) -> bool:
    """Return whether a folder is a whole model of Hugging Face's, its files complete.

    Adapters, Meta's files and GGUF are not looked into. Raises ConfigError for what is no model.
    """

    def refuse(text: str, fix: str) -> ConfigError:
        return ConfigError(ConfigIssue("FOLDER", text, fix, str(folder)))

    if not folder.is_dir():
        text = "is not a folder" if folder.exists() else "does not exist"
        raise refuse(text, "name the folder of an export")
    kind = kind_of(folder)
    if kind in ("step", "dcp"):
        text = "is a checkpoint of torch.distributed.checkpoint, which other programs do not read"
        raise refuse(text, f"export it first: torchtitan export {folder} OUT")
    if kind in (None, "torch"):
        raise refuse("holds no model", "name the folder of an export")
    if kind != "hf" or (folder / _ADAPTER).is_file():
        return False
    from torchtitan.weights.safetensors_source import read_headers

    if not (folder / "config.json").is_file():
        raise refuse("has no config.json", "name the folder of an export")
    try:
        read_headers(folder)
    except InvalidWeights as error:
        raise refuse(f"is not whole: {error}", "export it again") from error
    return True
