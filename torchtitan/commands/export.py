"""`torchtitan export`: a checkpoint as other programs read it, verified."""

import argparse
from pathlib import Path

from torchtitan.config.errors import ConfigError
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path


def run(options: argparse.Namespace) -> int:
    """Check the paths, then write; exit status 0. Raises ConfigError and CheckpointError."""
    from torchtitan.training.export import Target, check_target, write_model
    from torchtitan.training.open_model import open_model
    from torchtitan.utils.logging import init_logging

    out = Path(expand_path(options.out))
    if issues := check_target(out):
        raise ConfigError(issues)
    init_logging(0)
    format = options.format or ("gguf" if out.suffix.lower() == ".gguf" else "hf")
    target = Target(out, format, options.dtype, options.max_shard_size)
    model = open_model(Path(expand_path(options.step)), options.tokenizer)
    print(write_model(model, target))
    return DONE
