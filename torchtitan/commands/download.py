"""`torchtitan download`: a model's tokenizer, or other files of it, from the Hugging Face hub.

The repository's file names are listed first: so the error can say where in the repository the
tokenizer is, and only files with known names are written.
"""

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.weights.hub import Asked

T = TypeVar("T")
_LOCAL_DIR = "torchtitan/datasets/tokenizer/"
_ASSETS_DIR = "assets/hf/"
_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_BESIDE_IT = ("tokenizer_config.json", "special_tokens_map.json")
ASSETS = {
    "tokenizer": (*_TOKENIZER, *_BESIDE_IT),
    "config": ("config.json", "generation_config.json"),
    "index": ("*.safetensors.index.json",),
    "safetensors": ("*.safetensors",),
}
"""File patterns of the kinds that `--assets` takes."""


def run(options: argparse.Namespace) -> int:
    """Download, and print what was written. Raises ConfigError."""
    if options.assets and options.tokenizer_path:
        options.parser.error("takes --assets or --tokenizer_path, not both")
    if options.hf_token:
        print(
            "warning: other users of this machine can see --hf_token in the list of processes, and"
            " the shell remembers it; set HF_TOKEN or run `hf auth login` instead. It is not"
            " stored.",
            file=sys.stderr,
        )
    names = _ask(options, _list_files)
    wanted = _chosen_assets(names, options) if options.assets else _chosen(names, options)
    default = _ASSETS_DIR if options.assets else _LOCAL_DIR
    folder = Path(expand_path(options.local_dir or default))
    if options.assets:
        folder /= options.repo_id.rpartition("/")[2]
    for name in wanted:
        _ask(options, partial(_download_file, name, folder))
        print(f"wrote {folder / name}")
    tokenizer = next((folder / name for name in wanted if _is_tokenizer(name)), None)
    if tokenizer is not None:
        path = tokenizer.parent.as_posix()
        print(f'{build_tokenizer(path).vocab_size:,} tokens; set model.tokenizer_path = "{path}"')
    return 0


def _list_files(where: dict[str, Any]) -> list[str]:
    from huggingface_hub import model_info

    # Unlike list_repo_files, this does not retry: without a network it fails at once.
    return [file.rfilename for file in model_info(**where, timeout=30).siblings or []]


def _download_file(name: str, folder: Path, where: dict[str, Any]) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(filename=name, local_dir=str(folder), **where)


def _ask(options: argparse.Namespace, question: Callable[[dict[str, Any]], T]) -> T:
    """Return the hub's answer. Raises ConfigError if it refuses or cannot be reached."""
    # With None, the library uses HF_TOKEN or the login.
    token = options.hf_token or None
    keys = ("--repo_id", "--revision", "--local_dir")
    return Asked(options.repo_id, options.revision, token, *keys).ask(question)


def _chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    """Choose the tokenizer's files in the folder of `--tokenizer_path`."""
    inside = options.tokenizer_path.strip("/")
    if inside in names:
        return [inside]
    prefix = f"{inside}/" if inside else ""
    looked_for = [prefix + name for name in _TOKENIZER]
    if any(name in names for name in looked_for):
        beside = [prefix + name for name in _BESIDE_IT]
        return [name for name in (*looked_for, *beside) if name in names]
    elsewhere = [name for name in names if _is_tokenizer(name)]
    fix = "use the repository of another form of the model"
    if elsewhere:
        fix = f"it has {', '.join(elsewhere)}: name the folder of one by --tokenizer_path"
    problem = f"has no tokenizer there; looked for {', '.join(looked_for)}"
    raise ConfigError(ConfigIssue("--repo_id", problem, fix, options.repo_id))


def _is_tokenizer(name: str) -> bool:
    return name.rpartition("/")[2] in _TOKENIZER


def _chosen_assets(names: list[str], options: argparse.Namespace) -> list[str]:
    """Choose the files of each kind, all at the top of the repository."""
    wanted: list[str] = []
    for kind in options.assets:
        patterns = ASSETS[kind]
        found = [n for n in names if "/" not in n and any(fnmatchcase(n, p) for p in patterns)]
        if not found:
            problem = f"has no {kind}; looked for {', '.join(patterns)}"
            fix = f"leave {kind} out of --assets, or use another repository"
            raise ConfigError(ConfigIssue("--repo_id", problem, fix, options.repo_id))
        wanted += found
    return list(dict.fromkeys(wanted))
