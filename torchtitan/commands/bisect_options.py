"""The arguments of `bisect`. No torch."""

import argparse


def add_bisect_arguments(parser: argparse.ArgumentParser) -> None:
    """Train one step on two sides, and name the first tensor in which they differ.

    A side is one word of the shell, so quote it if it has options:

      CONFIG.toml            the first step of a run
      RUN --step N           step N of a run, from its newest checkpoint before it
      CHECKPOINT             the other side's config, with these weights: a step, a Hugging Face
                             folder, Meta's, or a GGUF file
      FOLDER                 what a run with debug.record_tensors has written, anywhere

    followed by settings (--section.key value) and, for one side alone,

      --mesh AXIS=N,...      degrees of pp, dp_replicate, dp_shard, cp and tp; others are 1
      --step N               the step to compare (default: 1)
      --python PATH          the interpreter of another environment, with another torch

    Settings outside of the quotes are of both sides. Both train in float64, so that any difference
    above 1e-9 is one of computation, not of rounding.

      torchtitan bisect llama.toml "llama.toml --mesh tp=2,dp_shard=2"
      torchtitan bisect "runs/a --step 900" "runs/a --step 900 --mesh tp=2"
      torchtitan bisect llama.toml "llama.toml --model.handlers compile"
      torchtitan bisect llama.toml "llama.toml --python old/bin/python" --as-is

    In the order of the step, these are compared: batch, parameters, outputs of modules, loss,
    gradients of their inputs, gradients of parameters, their norm, parameters after the step. The
    exit status is 0 if the sides are the same, 1 if they differ, and 2 if one cannot be trained.
    """
    parser.add_argument("one", metavar="A", help="the side that counts as right")
    parser.add_argument("other", metavar="B", help="the side to compare with it")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="keep the number formats of the sides. A is also trained in float64, and B may differ"
        " from A by 8 times as much as A does from that",
    )
    parser.add_argument(
        "--bound",
        metavar="REL",
        type=float,
        help="the relative difference that counts as rounding, instead",
    )
    parser.add_argument(
        "--keep", metavar="DIR", help="a new folder for all that is recorded, which stays"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
