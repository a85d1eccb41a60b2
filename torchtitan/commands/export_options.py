"""The arguments of `export`, `convert` and `upload`. No torch."""

import argparse

from torchtitan.commands.generation_options import add_base, add_modules, add_option

_DTYPES = ("float32", "bfloat16", "float16")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Write a checkpoint for other programs, and verify it.

    OUT is a folder for transformers, vLLM and others (hf: safetensors, configs, tokenizer, model
    card), a folder for Meta's code (meta), or a file for llama.cpp (gguf; needs the extra `gguf`).
    It is the same, whatever mesh wrote the step. It appears when it is complete: what was written
    is read back, compared bit by bit, and run on a probe batch next to the original, by
    transformers, too, where that is installed.

    A step of adapters is written merged into its base (--merge), in any format, or alone
    (--adapter): a folder that peft loads.
    """
    parser.add_argument(
        "step", metavar="STEP", help="a step, a run's folder (its newest step), or other weights"
    )
    parser.add_argument("out", metavar="OUT", help="a new folder, or file for gguf")
    parser.add_argument("--format", choices=("hf", "gguf", "meta"), help="default: hf, or by OUT")
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--merge", action="store_true", help="of a step of adapters: merge them into the base"
    )
    adapters.add_argument(
        "--adapter", action="store_true", help="of a step of adapters: write these, for peft"
    )
    add_base(parser)
    _add_writing(parser)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Convert a checkpoint to another format.

    IN is a step or run's folder of this library, any folder of torch.distributed.checkpoint, a
    Hugging Face folder, Meta's, a GGUF file of a Llama or Qwen3, or a .pt file of torch.save. Its
    kind is recognised from its content. OUT is new: a folder (hf, meta, dcp), or a file (gguf, pt).

    dcp and pt hold tensors without hyper-parameters, and take as much memory as they are large.
    torch.load(OUT, weights_only=True, mmap=True) reads a .pt file. `torchtitan convert dcp-to-torch
    IN OUT` writes one, too.
    """
    parser.add_argument("paths", metavar="IN OUT", nargs="+")
    parser.add_argument(
        "--format",
        choices=("dcp", "hf", "meta", "gguf", "pt"),
        help="default: gguf or pt if OUT ends with .gguf, .pt or .pth, else hf",
    )
    parser.add_argument(
        "--model",
        metavar="FAMILY/FLAVOR",
        help="the model of a .pt file or foreign DCP folder, such as llama3/8B",
    )
    _add_writing(parser)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="convert to this type (default: keep the types)"
    )
    add_option(
        parser,
        "max-shard-size",
        metavar="SIZE",
        type=_size,
        default="5GB",
        help="largest safetensors file, such as 500MB (default: 5GB)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    add_modules(parser)


def add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    """Upload a folder, such as an export, to the Hugging Face hub.

    A repository that does not exist is made, private unless --public is given; one that everybody
    may read needs --public, too. Weights of an earlier upload that FOLDER lacks are removed. An
    upload that was interrupted continues: files that the hub has are not sent again. Needs a token
    that may write: set HF_TOKEN, or run `hf auth login`.
    """
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("repo_id", metavar="OWNER/NAME")
    parser.add_argument("--public", action="store_true", help="everybody may read a new repository")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def _size(text: str) -> str:
    number = text.upper().removesuffix("B").rstrip("KMGT")
    if not number.isdecimal() or int(number) == 0 or not text.upper().endswith("B"):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 5GB")
    return text.upper()


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Download a model's tokenizer, or other files of it, from the Hugging Face hub.

    Gated models need a token: set HF_TOKEN, or run `hf auth login`.
    """
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "repo_id",
        metavar="OWNER/NAME",
        nargs="?",
        default=argparse.SUPPRESS,  # which leaves the value of --repo_id
        help="the model on the hub",
    )
    model.add_argument("--repo_id", help="the same, by TorchTitan's name")
    parser.add_argument("--tokenizer_path", default="", help="folder or file in the repository")
    parser.add_argument(
        "--assets",
        nargs="+",
        choices=("tokenizer", "config", "index", "safetensors"),
        help="kinds of files, instead of the tokenizer only",
    )
    parser.add_argument(
        *("--local_dir", "--output-dir"),
        help="folder to write to (default: torchtitan/datasets/tokenizer/; with --assets"
        " assets/hf/NAME)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument(
        "--hf_token", help="visible to other users of this machine: set HF_TOKEN or log in instead"
    )
