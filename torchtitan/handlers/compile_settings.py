"""Settings of the handler `compile`."""

from torchtitan.config.section import Section


class CompileSettings(Section):
    backend: str = "inductor"
    """Compiler backend: `inductor` for speed; `eager` and `aot_eager` help to find who is wrong."""
