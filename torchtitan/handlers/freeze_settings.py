"""Settings of the handler `freeze`."""

from pydantic import ValidationInfo, field_validator

from torchtitan.config.schema import Names, Section


class FreezeSettings(Section):
    patterns: Names = ()
    """Globs over full parameter names: what matches one is frozen."""

    only: Names = ()
    """In place of `patterns`: only what matches one of these globs is trained, all else frozen."""

    @field_validator("only")
    @classmethod
    def _one_of_the_two(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        patterns = info.data.get("patterns")
        if patterns and value:
            raise ValueError("does not go with patterns. Fix: leave out one of the two")
        if patterns == () and not value:
            raise ValueError(
                "is empty, and patterns too, so nothing would be frozen. Fix: write patterns ="
                ' ["layers.0.*"], or only = ["output.*"], or leave the handler out'
            )
        return value
