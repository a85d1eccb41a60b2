"""The arguments of `download`. No torch."""

import argparse


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Download a model's tokenizer, or other files of it, from the Hugging Face hub.

    Gated models need a token: set HF_TOKEN, or run `hf auth login`.
    """
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME of the model on the hub")
    parser.add_argument("--tokenizer_path", default="", help="folder or file in the repository")
    parser.add_argument(
        "--assets",
        nargs="+",
        choices=("tokenizer", "config", "index", "safetensors"),
        help="kinds of files, instead of the tokenizer only",
    )
    parser.add_argument(
        "--local_dir",
        help="folder to write to (default: torchtitan/datasets/tokenizer/; with --assets"
        " assets/hf/NAME)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument(
        "--hf_token", help="visible to other users of this machine: set HF_TOKEN or log in instead"
    )
