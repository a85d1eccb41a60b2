"""Sections about the model and about changes to it."""

from typing import Any, Literal

from pydantic import Field

from torchtitan.config.section import Names, Section


class Model(Section):
    name: str = "llama3"
    """Model family; `torchtitan list models` prints the families with their flavors."""

    flavor: str = "debugmodel"
    """Size within the family."""

    tokenizer_path: str = "bytes"
    """`bytes` (one token a byte, needs no file), a `tokenizer.json`, or a folder that holds one."""

    handlers: Names = ()
    """Model handlers, applied in this order; each has its settings in `[handlers.NAME]`."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters that override the flavor's, for example `n_layers = 4`."""


class ActivationCheckpoint(Section):
    mode: Literal["none", "full", "selective"] = "selective"
    """`full` recomputes every block in the backward, `selective` a part, `none` keeps everything."""

    selective_ac_option: str = "2"
    """With `selective`: `op` keeps what is dear to recompute (attention, every second matrix
    product), a number n recomputes every n-th block."""

    preserve_rng_state: bool = True
    """Restore the random state for the recomputation; only needed by models with dropout."""
