"""The arguments of `inspect` and `status`. No torch."""

import argparse


def add_inspect_arguments(parser: argparse.ArgumentParser, compares: bool = False) -> None:
    """Show what a checkpoint holds, and whether it is intact; or how two of them differ.

    The checkpoint is a step, a run's folder (its newest step), a folder of
    torch.distributed.checkpoint, Hugging Face's or Meta's, a GGUF file, or hf://owner/name. With
    OTHER, hyper-parameters, settings and tensors are compared, by our names and in our order, so
    that a step can be compared with the folder that it came from.

    The exit status is 4 if anything is damaged or missing, and 5 if a weight is not finite.
    """
    checkpoint = "a step, a run's folder, a folder of weights, a GGUF file, or hf://owner/name"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=checkpoint)
    nargs = None if compares else "?"
    parser.add_argument("other", metavar="OTHER", nargs=nargs, help="a checkpoint to compare with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--headers",
        action="store_true",
        help="read names and sizes only: fast, without norms, values or a check of contents",
    )


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Show where a run stands: state, step, last checkpoint, rate, expected end, last error.

    All of it is read from the run's folder, on any machine that sees it.
    """
    parser.add_argument("run", metavar="RUN", help="a run's folder, job.dump_folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
