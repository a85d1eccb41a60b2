"""`torchtitan export`: a checkpoint as other programs read it, verified."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.remote import RemoteError, RemoteFolder, is_remote

_LAST = ("model.safetensors.index.json", "adapter_config.json", "params.json", "config.json")
"""Files without which a folder is no model, in the order of their upload, after all others."""


def run(options: argparse.Namespace) -> int:
    """Check the paths, then write; exit status 0. Raises ConfigError and CheckpointError."""
    from torchtitan.checkpoint.base_place import moved_base
    from torchtitan.training.adapters import open_adapted
    from torchtitan.training.export import Target, check_target, write_adapter, write_model
    from torchtitan.training.open_model import open_model
    from torchtitan.training.pretrained import under_command_key
    from torchtitan.utils.logging import init_logging
    from torchtitan.weights.remote import local_path

    out = expand_path(options.out)
    issues = [] if is_remote(out) else check_target(Path(out))
    if options.adapter and options.format not in (None, "hf"):
        problem, fix = "is no format of adapters", "leave it out, or write --merge for --adapter"
        issues.append(ConfigIssue("--format", problem, fix, options.format))
    if issues:
        raise ConfigError(issues)
    init_logging(0)
    format = options.format or ("gguf" if out.lower().endswith(".gguf") else "hf")

    def write(path: Path) -> str:
        target = Target(path, format, options.dtype, options.max_shard_size)
        with under_command_key():
            step = local_path(expand_path(options.step))
        if not options.adapter and not options.merge:
            return write_model(open_model(step, options.tokenizer), target)
        adapted = open_adapted(step, options.tokenizer, moved_base(options.base))
        if options.merge:
            return write_model(adapted.merged(options.dtype), target)
        return write_adapter(adapted, target)

    print(_write_remote(write, out) if is_remote(out) else write(Path(out)))
    return DONE


def _write_remote(write: Callable[[Path], str], url: str) -> str:
    """Write to a temporary folder (`TMPDIR`), then upload; return a sentence about it.

    The files by which readers recognise a model are uploaded last: before that there is none.
    Raises ConfigError.
    """
    try:
        remote = RemoteFolder(url)
        if {"", *_LAST} & set(remote.files()):
            issue = ConfigIssue("OUT", "exists already", "remove it, or choose another name", url)
            raise ConfigError(issue)
        with TemporaryDirectory(prefix="torchtitan-export-") as folder:
            path = Path(folder) / url.rstrip("/").rpartition("/")[2]
            text = write(path)
            files = sorted(path.iterdir() if path.is_dir() else [path], key=_order)
            for file in files:
                remote.upload(file, file.name if path.is_dir() else "")
    except RemoteError as error:
        fix = "check the URL, the credentials and the network; then run the command again"
        raise ConfigError(ConfigIssue("OUT", str(error), fix, url)) from error
    return text.replace(str(path), url)


def _order(file: Path) -> int:
    return _LAST.index(file.name) + 1 if file.name in _LAST else 0
