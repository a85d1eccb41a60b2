"""`torchrun -m torchtitan.train`: the command `torchtitan train`."""

import sys

from torchtitan.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
