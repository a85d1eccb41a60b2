"""`torchtitan export`: a checkpoint as other programs read it, verified."""

import argparse
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path


def run(options: argparse.Namespace) -> int:
    """Check the paths, then write; exit status 0. Raises ConfigError and CheckpointError."""
    from torchtitan.checkpoint.base_place import moved_base
    from torchtitan.training.adapters import open_adapted
    from torchtitan.training.export import Target, check_target, write_adapter, write_model
    from torchtitan.training.open_model import open_model
    from torchtitan.utils.logging import init_logging

    out = Path(expand_path(options.out))
    issues = check_target(out)
    if options.adapter and options.format not in (None, "hf"):
        problem, fix = "is no format of adapters", "leave it out, or write --merge for --adapter"
        issues.append(ConfigIssue("--format", problem, fix, options.format))
    if issues:
        raise ConfigError(issues)
    init_logging(0)
    format = options.format or ("gguf" if out.suffix.lower() == ".gguf" else "hf")
    target = Target(out, format, options.dtype, options.max_shard_size)
    step = Path(expand_path(options.step))
    if not options.adapter and not options.merge:
        print(write_model(open_model(step, options.tokenizer), target))
        return DONE
    adapted = open_adapted(step, options.tokenizer, moved_base(options.base))
    if options.merge:
        print(write_model(adapted.merged(options.dtype), target))
    else:
        print(write_adapter(adapted, target))
    return DONE
