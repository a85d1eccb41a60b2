"""`torchrun -m torchtitan.train`: the command `torchtitan train`."""

import sys
import types
from typing import Any

from torchtitan.cli import main


class _Program(types.ModuleType):
    """The module, which importing it puts into the place of the function `torchtitan.train`."""

    def __call__(self, config: Any) -> Any:
        from torchtitan.api.train import train

        return train(config)


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
sys.modules[__name__].__class__ = _Program
