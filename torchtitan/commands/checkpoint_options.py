"""The arguments of `checkpoint ls`, `verify`, `diff` and `prune`. No torch."""

import argparse

from torchtitan.commands.generation_options import add_option, positive
from torchtitan.commands.inspect_options import add_inspect_arguments

_RUN = "a run's folder (job.dump_folder), or its folder of checkpoints"


def add_ls_arguments(parser: argparse.ArgumentParser) -> None:
    """List the steps of a run, and what is left of others, with state, size, time and tokens.

    `valid` means that names and sizes are those of the manifest; `verify` reads the contents. The
    last column says which step the next start takes, and which steps are more than the run's
    checkpoint.keep_latest_k: its next save deletes them.
    """
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Check a step, or all steps of a run, as a start does before it loads one.

    Every byte is compared with its digest, several files at a time. The exit status is 4 if
    anything is damaged or missing; stderr names the files.
    """
    text = f"a step, {_RUN}"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    parser.add_argument("--quick", action="store_true", help="compare names and sizes only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Show how two checkpoints differ: `torchtitan inspect CHECKPOINT OTHER`."""
    add_inspect_arguments(parser, compares=True)


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Delete old steps of a run that no job is training.

    Only valid steps of this run are deleted, and never the newest one, which is verified first.
    Name what to delete: steps by --keep or --step, and other folders by --leftovers. What refers to
    a deleted step, such as the adapters of another run, is not looked for.
    """
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument(
        "--keep", metavar="K", type=positive, help="delete all valid steps but the newest K"
    )
    parser.add_argument(
        "--step", metavar="N", type=int, nargs="+", action="extend", default=[], dest="steps",
        help="delete these steps",
    )  # fmt: skip
    parser.add_argument(
        "--leftovers",
        action="store_true",
        help="delete what is quarantined, rewound, or left by a killed job",
    )
    show = "only show what would be deleted"
    add_option(parser, "dry-run", action="store_true", help=show)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
