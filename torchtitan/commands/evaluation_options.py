"""The arguments of `evaluate`. No torch."""

import argparse

from torchtitan.commands.generation_options import add_model_options, positive


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
    parser.add_argument(
        *("--task-dir", "--task_dir"), metavar="DIR", help="a folder of YAML files with more tasks"
    )
    parser.add_argument(
        *("--num-fewshot", "--num_fewshot"),
        metavar="N",
        type=_not_negative,
        help="solved examples in each prompt (default: the task's)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=positive, help="only the first N examples of each task"
    )
    parser.add_argument(
        *("--batch-size", "--batch_size"),
        metavar="N",
        type=positive,
        default=8,
        help="requests that a rank answers at once; changes no figure (default: 8)",
    )
    parser.add_argument(
        *("--apply-chat-template", "--apply_chat_template"),
        action="store_true",
        help="put each request as a user's message to a chat model",
    )
    parser.add_argument("--output", metavar="FILE.json", help="a new file for all figures")


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)
