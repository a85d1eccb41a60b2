"""Configuration: frozen sections, loading (defaults < TOML < command line), errors. No torch."""

from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    ConfigIssue,
    DataError,
    HangError,
    NonFiniteError,
)
from torchtitan.config.schema import JobConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConfigIssue",
    "DataError",
    "HangError",
    "JobConfig",
    "NonFiniteError",
]
