"""The arguments of `evaluate`. No torch."""

import argparse

from torchtitan.commands.generation_options import (
    add_batch_size,
    add_model_options,
    add_option,
    positive,
)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Measure any checkpoint on benchmarks, by EleutherAI's lm-eval (extra `eval`).

    --tasks names tasks, groups or tags of lm-eval, or of YAML files in --task-dir. The figures are
    those of lm-eval's own Hugging Face backend, on every mesh.

    Under torchrun (`torchrun --nproc_per_node N -m torchtitan evaluate ...`) the ranks share the
    model by --tensor-parallel-degree and --data-parallel-shard-degree, and data ranks the requests.
    """
    add_model_options(parser)
    parser.set_defaults(seed=0)
    parser.add_argument(
        "--tasks", metavar="NAME[,NAME...]", required=True, help="what to measure, by commas"
    )
    add_option(
        parser, "task-dir", metavar="DIR", help="a folder of YAML files with tasks of your own"
    )
    text = "solved examples in each prompt (default: the task's)"
    add_option(parser, "num-fewshot", metavar="N", type=_not_negative, help=text)
    parser.add_argument(
        "--limit", metavar="N", type=positive, help="only the first N examples of each task"
    )
    add_batch_size(parser, "requests that a rank answers at once; changes no figure")
    text = "put each request as a user's message to a chat model"
    add_option(parser, "apply-chat-template", action="store_true", help=text)
    parser.add_argument("--output", metavar="FILE.json", help="a new file for all figures")


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)
