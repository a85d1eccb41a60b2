"""`torchtitan train --help`: apart from `train`, which imports much that no help needs."""

import argparse
from contextlib import suppress

from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError
from torchtitan.config.exit_codes import DONE
from torchtitan.config.help_text import OVERVIEW, print_help
from torchtitan.config.load import load_config


def run(options: argparse.Namespace) -> int:
    """Print the help on a topic, with what the config's `job.custom_import` adds."""
    topic = options.help
    if topic == OVERVIEW and len(options.settings) == 1 and options.settings[0].startswith("--"):
        [topic] = options.settings  # `train --training.steps --help`
    if topic == OVERVIEW:
        print_help(topic=topic)
        return DONE

    from torchtitan.commands.config import free_tables
    from torchtitan.commands.list import entry_text, lists

    with suppress(ConfigError):  # a run reports it
        import_custom_modules(load_config(options.settings).config, quiet=True)
    try:
        print_help(free_tables(), topic)
    except ConfigError:
        named = [(of, known) for of, known in lists().items() if known and topic in known]
        if not named:
            raise
        for of, known in named:
            print(f"{topic}, of `torchtitan list {of}`: {entry_text(known, topic)}")
    return DONE
