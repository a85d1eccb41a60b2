"""The base of every config section and the number types the sections share.

Sections are frozen pydantic models. They are strict (a string is never taken for a number), refuse
unknown keys and refuse nan and inf, because TOML happily parses all of those. The docstring below a
field is its documentation everywhere: in `--help`, in the JSON schema and on the reference page.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_INT64 = 2**63 - 1

Int = Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT64)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A TOML array of strings."""


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )
