"""The arguments of `plot`. No torch."""

import argparse


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    """Draw the curves of one or several runs as a picture, one chart a metric.

    Drawn are loss, learning rate, gradient norm, throughput and memory, and validation sets and
    evaluated tasks where there are any. A run may be at work. A file that is there is replaced.

      torchtitan plot outputs/debug_model
      torchtitan plot runs/a runs/b --by tokens --smooth 0.9 --output ab.svg
      torchtitan plot runs/a --metrics "loss,validation,time_share/*"

    It needs matplotlib: `pip install -e '.[plot]' -c constraints.txt` in the clone.
    """
    run = "a run's folder, job.dump_folder, or a metrics.jsonl"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=run)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=".png, .svg or .pdf (default: plot_RUN.png here, of several runs plot.png)",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="keys of the records, with * for any letters; a name also means all below it",
    )
    parser.add_argument(
        "--smooth",
        metavar="X",
        type=smoothing,
        help="a weight below 1, as TensorBoard's (0.9), or the mean over so many steps (100); the"
        " measured line stays, faintly",
    )
    parser.add_argument("--log", action="store_true", help="losses and norms on a log scale")
    parser.add_argument(
        "--by",
        choices=("steps", "tokens", "time"),
        default="steps",
        help="what the runs are aligned by; time is that of all starts of a run (default: steps)",
    )
    parser.add_argument("--dark", action="store_true", help="light lines on black")


def smoothing(text: str) -> float:
    """Return a weight from 0 to 1, or a whole number of steps. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number < 1 or (1 <= number <= 1e9 and number.is_integer())):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a weight below 1 nor a number of steps"
        )
    return number
