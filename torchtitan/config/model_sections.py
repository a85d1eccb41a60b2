"""Sections about the model and about changes to it."""

from typing import Any, Literal

from pydantic import Field, field_validator

from torchtitan.config.paths import PathText
from torchtitan.config.section import Fraction, Names, Section

NormType = Literal["rmsnorm", "layernorm", "np_layernorm", "fused_rmsnorm"]


class Model(Section):
    name: str = "llama3"
    """Model family; `torchtitan list models` prints the families with their flavors."""

    flavor: str = "debugmodel"
    """Size within the family."""

    tokenizer_path: PathText = "bytes"
    """`bytes` (one token a byte, needs no file), a `tokenizer.json`, a `tokenizer.model` of
    tiktoken or sentencepiece, or a folder that holds one."""

    norm_type: NormType = "rmsnorm"
    """Norm before attention and feed-forward and at the end: `rmsnorm`; `fused_rmsnorm`, the same
    by PyTorch's own function on every device; `layernorm` without a bias; `np_layernorm` without
    parameters."""

    handlers: Names = ()
    """Model handlers, applied in this order; each has its settings in `[handlers.NAME]`."""

    print_after_conversion: bool = False
    """Log the model's modules after the handlers have changed it, and before it is cut."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters that override the flavor's, for example `n_layers = 4`."""


class ActivationCheckpoint(Section):
    mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
    """`full` recomputes every block in the backward, `selective` a part of them (see
    `selective_ac_option`), `none` keeps everything. `memory_budget` leaves it to the compiler to
    choose what is cheapest to recompute; it needs the handler `compile`."""

    selective_ac_option: str = "2"
    """With `selective`: `op` keeps what is dear to recompute (attention, every second matrix
    product), a number n recomputes every n-th block."""

    @field_validator("selective_ac_option")
    @classmethod
    def _op_or_number(cls, value: str) -> str:
        if value == "op" or (value.isascii() and value.isdigit() and int(value) > 0):
            return value
        raise ValueError('is neither "op" nor a positive number. Fix: write "op", or "2" for half')

    memory_budget: Fraction = 0.5
    """With `memory_budget`: memory that a block's activations may take, from 0 (that of `full`) to
    1 (what the compiler keeps by itself)."""

    preserve_rng_state: bool = True
    """Restore the random state for the recomputation; only needed by models with dropout."""

    offload: bool = False
    """Keep in host memory, until the backward, what the blocks' activations take; on CUDA the
    copies run beside the computation. Goes with every `mode`, for what it keeps."""
