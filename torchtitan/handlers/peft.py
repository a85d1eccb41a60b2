"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Their names are Hugging Face's, and rows of B (and DoRA's magnitudes) that make RoPE's channels are
in Hugging Face's order, like those of the matrix.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchtitan.handlers.settings import LoraSettings
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.hf_weights import from_hf, hf_names, our_names, to_hf
from torchtitan.weights.recognise import InvalidWeights, read_json_object

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
}
_UNSUPPORTED: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "trainable_token_indices": None,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""Settings of PEFT that change the model in ways that `lora` does not have; what is plain."""
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which the adapter is for other weights than the base's."""


def write_peft(
    folder: Path,
    adapters: Mapping[str, Tensor],
    settings: LoraSettings,
    family: ModelFamily,
    args: DecoderArgs,
    *,
    weights: Collection[str],
    base: str,
) -> None:
    """Fill an empty folder with whole adapters, by our names.

    `weights` are the names of all parameters of the base model, which is at `base`. Raises
    ValueError for a linear that Hugging Face's model does not have.
    """
    theirs = {}
    for name, tensor in adapters.items():
        linear, _, key = name.rpartition(".")
        weight = f"{linear}.weight"
        row = hf_names([weight], family.hf_weights, args)[weight]
        module = row.theirs.removesuffix(".weight")
        if key != "lora_a":
            (tensor,) = to_hf({weight: tensor}, family.hf_weights, args).values()
        theirs[f"{_PREFIX}{module}{_PARTS[key]}"] = tensor.contiguous()
    # save_file would let nobody else read it.
    (folder / WEIGHTS_NAME).write_bytes(save(theirs, metadata={"format": "pt"}))
    adapted = {_module_of(name) for name in theirs}
    known = hf_names(weights, family.hf_weights, args).values()
    modules = {row.theirs.removesuffix(".weight") for row in known}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _short(adapted, modules),
        "bias": "none",
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json`. Raises `InvalidWeights` for adapters that `lora` cannot be."""
    file = folder / CONFIG_NAME
    config: dict[str, Any] = read_json_object(file)
    if config.get("peft_type") != "LORA":
        raise InvalidWeights(f"{file}: peft_type is {config.get('peft_type')!r}, not LORA")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key) and config[key] != plain:
            raise InvalidWeights(f"{file}: {key} = {config[key]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_BASE):
        raise InvalidWeights(
            f"{file}: init_lora_weights = {start!r} changes the base's weights; save the adapter"
            " for the unchanged ones, with peft's path_initial_model_for_weight_conversion"
        )
    return config


def read_peft(folder: Path, family: ModelFamily, args: DecoderArgs) -> dict[str, Tensor]:
    """Return whole adapters by our names. Raises `InvalidWeights`."""
    file = folder / WEIGHTS_NAME
    endings = {ending: key for key, ending in _PARTS.items()}
    adapters = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                module = _module_of(name)
                key = endings.get(name.removeprefix(_PREFIX).removeprefix(module))
                if key is None:
                    raise InvalidWeights(f"{file}: {name} is not an adapter's")
                weight, tensor = f"{module}.weight", stored.get_tensor(name)
                row = our_names([weight], family.hf_weights, args)[weight]
                if key != "lora_a":
                    (tensor,) = from_hf({weight: tensor}, family.hf_weights, args).values()
                adapters[f"{row.ours.removesuffix('.weight')}.{key}"] = tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidWeights(f"{file}: cannot be read: {error}") from error
    return adapters


def _module_of(name: str) -> str:
    return name.removeprefix(_PREFIX).partition(".lora_")[0]


def _short(adapted: set[str], modules: set[str]) -> list[str]:
    """Return the last parts of the modules' names, or whole names if these say too much."""
    last = {module.rpartition(".")[2] for module in adapted}
    meant = {module for module in modules if module.rpartition(".")[2] in last}
    return sorted(last if meant == adapted else adapted)
