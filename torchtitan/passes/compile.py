"""torch.compile, block by block.

All blocks have the same code, so one compilation serves them all, and takes the same time for 4
layers as for 126. A handler marks what is to be compiled; when it happens is fixed by the order of
passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

_MARK = "_compile_options"


@dataclass(frozen=True)
class CompileOptions:
    """What the mark on a block says."""

    backend: str = "inductor"


def mark_for_compile(block: nn.Module, options: CompileOptions) -> None:
    """Ask for `block` to be compiled."""
    setattr(block, _MARK, options)


def is_marked_for_compile(block: nn.Module) -> bool:
    """Whether `block` is to be compiled, or is already."""
    return hasattr(block, _MARK)


def apply_compile(blocks: Mapping[str, nn.Module]) -> None:
    """Compile the marked blocks in place, each as one full graph; nothing runs yet."""
    for block in blocks.values():
        options = getattr(block, _MARK, None)
        if options is not None:
            block.compile(backend=options.backend, fullgraph=True)
