"""`python -m torchtitan WORD ...`, which is how torchrun starts a word on every rank."""

import sys

from torchtitan.cli import main

if __name__ == "__main__":
    sys.exit(main())
