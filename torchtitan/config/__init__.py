"""Configuration: frozen sections, loading (defaults < TOML < command line), errors. No torch."""

from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HangError,
    NonFiniteError,
    Problem,
)
from torchtitan.config.job_config import JobConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HangError",
    "JobConfig",
    "NonFiniteError",
    "Problem",
]
