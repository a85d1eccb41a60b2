"""TorchTitan's first place of the download script; see scripts/download_tokenizer.py."""

import sys

from torchtitan.cli import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
