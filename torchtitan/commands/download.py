"""`torchtitan download`: a model's tokenizer, or other files of it, from the Hugging Face hub.

The names of the repository's files are asked for first: so a repository without a tokenizer is told
from one that has it elsewhere, and only files of known names are written.
"""

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torchtitan.commands.hub_errors import hub_problem
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.data.tokenizers import build_tokenizer

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
"""What `--assets` may name, and the files that are meant by it."""
_DESCRIPTION = (
    "A model's tokenizer, or other files of it, from the Hugging Face hub. Gated models need a"
    " token: set HF_TOKEN, or run `hf auth login`."
)


def run(argv: list[str]) -> int:
    """Download as the arguments say; a ConfigError says what is in the way."""
    options = parse_arguments(argv)
    if options.hf_token:
        print(
            "warning: others on this machine can see --hf_token in the list of processes, and the"
            " shell remembers it; set HF_TOKEN or run `hf auth login` instead. It is used this"
            " once, and stored nowhere.",
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in the words of this program, without values: one may be a token."""

    def error(self, message: str) -> NoReturn:
        problem = message.partition(": '")[0].partition(" (choose")[0]
        raise ConfigError(ConfigIssue("download", problem, "see `torchtitan download --help`"))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """What the command line says. Raises ConfigError for one that cannot be meant."""
    parser = _Parser(prog="torchtitan download", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME of the model on the hub")
    parser.add_argument("--tokenizer_path", default="", help="folder or file in the repository")
    parser.add_argument(
        "--assets", nargs="+", choices=ASSETS, help="kinds of files, instead of the tokenizer only"
    )
    parser.add_argument(
        "--local_dir", help=f"folder to write to; {_LOCAL_DIR}, or with --assets {_ASSETS_DIR}NAME"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument(
        "--hf_token", help="visible to others on this machine; better set HF_TOKEN, or log in"
    )
    options, unknown = parser.parse_known_args(argv)
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if unknown:
        parser.error(f"does not know {', '.join(flags) if flags else 'one of the values'}")
    if options.assets and options.tokenizer_path:
        parser.error("takes --assets or --tokenizer_path, not both")
    return options


def _list_files(where: dict[str, Any]) -> list[str]:
    from huggingface_hub import model_info

    # Unlike the list of files proper, this is asked for once: who is offline is told at once.
    return [file.rfilename for file in model_info(**where, timeout=30).siblings or []]


def _download_file(name: str, folder: Path, where: dict[str, Any]) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(filename=name, local_dir=str(folder), **where)


def _ask(options: argparse.Namespace, question: Callable[[dict[str, Any]], T]) -> T:
    """The hub's answer. Raises ConfigError for whatever it, or the way to it, refuses."""
    import huggingface_hub

    # Without a token given, the library takes that of HF_TOKEN or of a login.
    where = {"repo_id": options.repo_id, "revision": options.revision}
    where["token"] = options.hf_token or None
    try:
        return question(where)
    except Exception as error:
        token = options.hf_token or huggingface_hub.get_token()
        problem = hub_problem(error, options.repo_id, options.revision, token)
        if problem is None:
            raise
    raise ConfigError(problem)


def _chosen(names: list[str], options: argparse.Namespace) -> list[str]:
    """The tokenizer's files in the folder that is asked for."""
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
        folders = sorted({name.rpartition("/")[0] for name in elsewhere})
        flags = [f"with `--tokenizer_path {name}`" if name else "without it" for name in folders]
        fix = f"it has {', '.join(elsewhere)}: call this {' or '.join(flags)}"
    problem = f"has no tokenizer there; looked for {', '.join(looked_for)}"
    raise ConfigError(ConfigIssue("--repo_id", problem, fix, options.repo_id))


def _is_tokenizer(name: str) -> bool:
    return name.rpartition("/")[2] in _TOKENIZER


def _chosen_assets(names: list[str], options: argparse.Namespace) -> list[str]:
    """The files of each kind, all from the top of the repository."""
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
