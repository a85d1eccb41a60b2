"""`torchtitan train --help`, rendered by tyro from the sections and their docstrings."""

_DESCRIPTION = """Train from a TOML file: torchtitan train FILE [--section.key value ...]

Every setting below can stand in the file or on the command line, which wins. Lists take spaces or
commas, switches take --x, --x true, --x false or --no-x. --model.args.KEY VALUE overrides a
hyper-parameter of the model, --handlers.NAME.KEY VALUE sets up a model handler.

--check looks whether the run could start, for WORLD_SIZE processes, without this machine's
hardware; --check full includes it."""


def print_help() -> None:
    """Print all settings with their documentation and defaults."""
    import tyro

    from torchtitan.config.job_config import JobConfig

    try:
        tyro.cli(
            JobConfig,
            prog="torchtitan train",
            description=_DESCRIPTION,
            args=["--help"],
            use_underscores=True,
        )
    except SystemExit:  # how an argument parser ends its help
        return
