"""Settings of the handler `compile`."""

from typing import Literal

from torchtitan.config.schema import Section


class CompileSettings(Section):
    backend: Literal["inductor", "cudagraphs", "aot_eager", "eager"] = "inductor"
    """Compiler backend: `inductor` for speed; `eager` and `aot_eager` help to find who is wrong."""
