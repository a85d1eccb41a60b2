"""One row a model family, from which the family tests are made.

`unit/models/test_families.py` checks sizes and declarations, `parity/test_hf_families.py` logits
and gradients against transformers, `distributed/test_family_meshes.py` eight meshes against one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtitan.config.registry import BUILT_IN
from torchtitan.models.registry import MODELS


@dataclass(frozen=True)
class FamilyRow:
    """Facts about a family that its code does not hold."""

    transformers: str
    """The model's class in transformers, without `ForCausalLM`."""
    parameters: Mapping[str, int]
    """Published number of parameters by flavor; tied embeddings count once."""
    head_sizes: Mapping[str, int]
    """Published channels of a head by flavor, which the number of parameters does not show."""
    common: Mapping[str, Any]
    """Published hyper-parameters that all flavors share."""
    exceptions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By flavor, published hyper-parameters in place of common ones."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters for tests of tiny models, in addition to the common ones."""
    variants: tuple[Mapping[str, Any], ...] = ({},)
    """Hyper-parameters to compare with transformers, each added to `tiny`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the config in transformers, in addition to the common ones."""


# Of the 6 frequencies of a head some are stretched, some are not, and one lies between.
SCALED_ROPE = {"rope_scaling_factor": 4.0, "rope_original_max_seq_len": 64}

LINEAR_ROPE = {"rope_scaling_factor": 4.0, "rope_scaling_type": "linear"}

YARN = {**SCALED_ROPE, "rope_scaling_type": "yarn", "rope_beta_fast": 6.0}
"""The last two of the 6 pairs of channels are stretched in full, two in part."""
SMOLLM2 = ("SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B")
SMOLLM2_COMMON = {
    "vocab_size": 49152,
    "max_seq_len": 8192,
    "rope_theta": 1e5,
    "tied_embeddings": True,
    "rope_scaling_factor": 1.0,
}

FAMILIES = {
    "llama3": FamilyRow(
        "Llama",
        {
            "1B": 1_235_814_400,
            "3B": 3_212_749_824,
            "8B": 8_030_261_248,
            "70B": 70_553_706_496,
            "405B": 405_853_388_800,
            "SmolLM2-135M": 134_515_008,
            "SmolLM2-360M": 361_821_120,
            "SmolLM2-1.7B": 1_711_376_384,
        },
        {"1B": 64, "3B": 128, "8B": 128, "70B": 128, "405B": 128, **dict.fromkeys(SMOLLM2, 64)},
        {
            "vocab_size": 128256,
            "max_seq_len": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0,
            "rope_original_max_seq_len": 8192,
        },
        exceptions={
            "SmolLM2-135M": SMOLLM2_COMMON,
            "SmolLM2-360M": SMOLLM2_COMMON,
            "SmolLM2-1.7B": {**SMOLLM2_COMMON, "rope_theta": 1.3e5},
        },
        variants=({}, SCALED_ROPE, LINEAR_ROPE, YARN, {"head_dim": 10}),
    ),
    "llama2": FamilyRow(
        "Llama",
        {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192},
        {"7B": 128, "13B": 128, "70B": 128},
        {
            "vocab_size": 32000,
            "max_seq_len": 4096,
            "norm_eps": 1e-5,
            "rope_theta": 1e4,
            "rope_scaling_factor": 1.0,
            "tied_embeddings": False,
        },
    ),
    "qwen3": FamilyRow(
        "Qwen3",
        {
            "0.6B": 596_049_920,
            "1.7B": 1_720_574_976,
            "4B": 4_022_468_096,
            "8B": 8_190_735_360,
            "14B": 14_768_307_200,
            "32B": 32_762_123_264,
        },
        dict.fromkeys(("0.6B", "1.7B", "4B", "8B", "14B", "32B"), 128),
        {
            "vocab_size": 151936,
            "max_seq_len": 40960,
            "rope_original_max_seq_len": 32768,
            "n_kv_heads": 8,
            "norm_eps": 1e-6,
            "rope_theta": 1e6,
            "qk_norm": True,
            "qkv_bias": False,
        },
        tiny={"head_dim": 14},
    ),
}


def built_in() -> list[str]:
    """Return the names of the library's own families."""
    return [name for name in MODELS if MODELS.origin(name) == BUILT_IN]
