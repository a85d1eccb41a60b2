"""Settings of the handler `mxfp8`, and what can be wrong with them. No torch, but in `probe`."""

from collections.abc import Iterator
from typing import Literal

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.linear_settings import (
    LinearSettings,
    needs_capability,
    no_float64,
    whole_blocks,
)

BLOCK = 32
EMULATED = "mxfp8_emulated"
_INSTEAD = f'leave it out, or, to try it slowly, set handlers.mxfp8.recipe_name to "{EMULATED}"'


class Settings(LinearSettings):
    """How linears are computed in MXFP8."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_emulated"] = "mxfp8_cublas"
    """`mxfp8_cublas` uses the units of Blackwell GPUs; `mxfp8_emulated` multiplies in high
    precision what was rounded to MXFP8, anywhere. Slow."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """What rounds along columns, for the backward: a kernel of Triton, one of CUDA, or PyTorch.
    Emulated it is always PyTorch."""


def check(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Problems of the settings with the device and the batch."""
    yield from no_float64(context, "mxfp8")
    why = "so many numbers share a scale"
    yield from whole_blocks(context, "mxfp8", BLOCK, why)
    if settings.recipe_name != EMULATED and context.device_type == "cpu":
        problem = "MXFP8 needs the units of Blackwell GPUs, and this run is on CPUs"
        yield ConfigIssue("model.handlers", problem, _INSTEAD, "mxfp8")


def probe(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Whether the GPU has MXFP8 units."""
    if settings.recipe_name != EMULATED:
        yield from needs_capability(context, "mxfp8", (10, 0), "Blackwell", _INSTEAD)
