"""The files of a tokenizer, which stay together: vocabulary, special tokens, chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_folder(path: Path) -> Path | None:
    """Return the folder of the tokenizer that comes with a model; None without one.

    `path` is the model's folder, or its file.
    """
    folder = path.parent if path.is_file() else path
    return next((folder for name in VOCABULARIES if (folder / name).is_file()), None)


def folder_of_tokenizer(tokenizer_path: str) -> Path:
    """Return the folder of the file or folder that `model.tokenizer_path` names."""
    path = Path(tokenizer_path).expanduser()
    return path.parent if path.is_file() else path


def copy_tokenizer(tokenizer_path: str, target: Path) -> bool:
    """Copy the files of `model.tokenizer_path` into `target`; return whether there are any.

    A file that is there already stays. Raises OSError.
    """
    given = Path(tokenizer_path)
    found = [given] if given.is_file() else [given / name for name in VOCABULARIES]
    found = [file for file in found if file.is_file()]
    if not found:  # the name of a registered one
        return False
    beside = [found[0].parent / name for name in TOKENIZER_FILES]
    target.mkdir(exist_ok=True)
    for file in dict.fromkeys([found[0], *beside]):
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return True


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a small file such as `generation_config.json`; empty without one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
