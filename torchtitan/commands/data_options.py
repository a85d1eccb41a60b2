"""The arguments of `data show`. No torch."""

import argparse

from torchtitan.commands.generation_options import positive


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Show the rows of a dataset as they are trained.

    FILE is a TOML, a run's folder, or the data themselves: a file, a folder or hf:owner/name, whose
    format is recognised by the columns of the first row; others need a TOML with data.format,
    data.columns and data.roles. Prints samples with the trained tokens in colour (between ⟦ and ⟧
    where there is no terminal), the lengths of all rows as a histogram, and how much of the
    sequences is padding, cut off or left out. `data show RUN STEP` shows the rows that a step of a
    run with data.ledger trained on.
    """
    parser.add_argument(
        "--samples", metavar="N", type=int, default=3, help="rows to print (default: 3)"
    )
    parser.add_argument(
        "--rows", metavar="N", type=positive, default=2000, help="rows to measure (default: 2000)"
    )
