"""Configuration: frozen sections, loading (defaults < TOML < command line), errors. No torch."""

from torchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    Problem,
)
from torchtitan.config.job_config import JobConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "JobConfig",
    "NonFiniteError",
    "Problem",
]
