"""`torchtitan convert`: a checkpoint from any format to any other."""

import argparse
import os
from pathlib import Path

from torchtitan.checkpoint.steps_folder import step_folders, step_name
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path

_BY_SUFFIX = {".pt": "pt", ".pth": "pt", ".gguf": "gguf"}
_OLD_NAME = "dcp-to-torch"


def run(options: argparse.Namespace) -> int:
    """Check the paths, then convert; exit status 0. Raises ConfigError and CheckpointError."""
    paths = list(options.paths)
    if paths[0] == _OLD_NAME and len(paths) > 1 and not os.path.lexists(_OLD_NAME):
        options.format, paths = options.format or "pt", paths[1:]
    if len(paths) != 2:
        options.parser.error(f"takes IN and OUT, not {len(paths)} paths")
    from torchtitan.training import export
    from torchtitan.training.open_model import open_model, open_tensors
    from torchtitan.utils.logging import init_logging

    source, out = (Path(expand_path(path)) for path in paths)
    issues = _check_source(source) + export.check_target(out)
    if issues:
        raise ConfigError(issues)
    init_logging(0)
    format = options.format or _BY_SUFFIX.get(out.suffix.lower(), "hf")
    target = export.Target(out, format, options.dtype, options.max_shard_size)
    if format in ("dcp", "pt"):
        print(export.write_tensors(open_tensors(source.resolve()), target))
    else:
        model = open_model(source, options.tokenizer, options.model)
        print(export.write_model(model, target))
    return DONE


def _check_source(path: Path) -> list[ConfigIssue]:
    if not path.exists():
        fix = "name a checkpoint, such as outputs/checkpoint/step-1000"
        return [ConfigIssue("IN", "does not exist", fix, str(path))]
    steps = step_folders(path)
    if steps and not (path / ".metadata").exists():
        fix = f"name one, such as {path / step_name(steps[-1])}"
        return [ConfigIssue("IN", "holds several checkpoints", fix, str(path))]
    return []
