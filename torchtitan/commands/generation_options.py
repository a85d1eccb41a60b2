"""The arguments of `generate` and `chat`. No torch."""

import argparse
from typing import Any

from torchtitan.config.custom_import import import_modules
from torchtitan.config.errors import ConfigError


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what opens a checkpoint on a mesh."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a step, a run's folder, a Hugging Face folder, Meta's, a GGUF file, or hf://owner/name",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    add_base(group)
    add_modules(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: bfloat16 on GPUs, float32 on CPUs)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: a GPU where there is one",
    )
    add_option(
        group,
        "tensor-parallel-degree",
        metavar="N",
        type=positive,
        default=1,
        help="under torchrun: ranks that share each matrix (default: 1)",
    )
    add_option(
        group,
        "data-parallel-shard-degree",
        metavar="N",
        type=positive,
        default=1,
        help="under torchrun: ranks that share the weights by FSDP, each with prompts of its own"
        " (default: 1; ranks that are left hold copies)",
    )


def add_base(parser: argparse._ActionsContainer) -> None:
    """Add `--base`."""
    text = "of a step of adapters: the unchanged base model, if it has moved"
    parser.add_argument("--base", metavar="PATH", help=text)


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add what decides the next token, and the end."""
    group = parser.add_argument_group("text")
    add_option(
        group,
        "max-new-tokens",
        metavar="N",
        type=positive,
        default=256,
        help="longest answer (default: 256)",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end where this text comes, without it; may be given several times",
    )
    numbers = (
        ("temperature", float, temperature, "0 takes the most probable token"),
        ("top-k", int, 0, "draw from the N most probable tokens only; 0: all"),
        ("top-p", float, 1.0, "draw from the most probable tokens that add up to P; 1: all"),
        ("min-p", float, 0.0, "leave out tokens below P times the most probable one"),
        ("repetition-penalty", float, 1.0, "above 1: repeat tokens less"),
        ("seed", int, 0, "the same seed draws the same tokens"),
    )
    for name, kind, default, text in numbers:
        letter = "N" if kind is int else "P" if name.endswith("-p") else "X"
        text = f"{text} (default: {default})"
        add_option(group, name, metavar=letter, type=kind, default=default, help=text)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Continue prompts with any checkpoint.

    One prompt is continued as the text comes; several in batches, each printed after its prompt.
    Without --temperature the most probable tokens are taken.

    A line of --input is an object with "prompt" (a text) or "messages" (a list of objects with
    "role" and "content", for the model's chat template). Its line of the output has all its fields,
    and "completion", "finish_reason" ("eos", "stop" or "length"), "prompt_tokens" and
    "completion_tokens".

    Under torchrun (`torchrun --nproc_per_node N -m torchtitan generate ...`) the ranks share the
    model by --tensor-parallel-degree and --data-parallel-shard-degree, and data ranks the prompts.
    """
    add_model_options(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="a text to continue")
    parser.add_argument("--input", metavar="FILE.jsonl", help="prompts, a JSON object a line")
    parser.add_argument("--output", metavar="FILE.jsonl", help="a new file, or - for stdout")
    add_batch_size(parser, "prompts that a rank continues at once")
    parser.add_argument(
        "--chat", action="store_true", help="each PROMPT is a user's message to a chat model"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message; implies --chat")
    add_sampling_options(parser, temperature=0.0)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Talk with a chat model in the terminal, or over a pipe, a message a line.

    Commands: /reset forgets the conversation, /system TEXT sets the system message and starts anew,
    /exit (or the end of the input) ends. The oldest turns are forgotten when the model's longest
    sequence is full.
    """
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_options(parser, temperature=0.7)


def add_batch_size(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--batch-size`."""
    text = f"{text} (default: 8)"
    add_option(parser, "batch-size", metavar="N", type=positive, default=8, help=text)


def add_option(parser: argparse._ActionsContainer, name: str, **settings: Any) -> None:
    """Add the option `--name`, which may be written with underscores, too."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    parser.add_argument(*names, **settings)


class _Import(argparse.Action):
    """Imports modules before the command begins."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        """Raise ConfigError for a module that cannot be imported."""
        if problems := import_modules(values.split(",")):
            raise ConfigError(problems)


def add_modules(parser: argparse._ActionsContainer) -> None:
    """Add the option for modules that the checkpoint's run imported: a stored config is data."""
    parser.add_argument(
        *("--job.custom_import", "--job.custom-import"),
        action=_Import,
        metavar="MODULE,...",
        help="modules to import, where the run that saved the checkpoint did, too",
    )


def positive(text: str) -> int:
    """Return a positive integer. Raises ArgumentTypeError."""
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 999999999")
    return int(text)
