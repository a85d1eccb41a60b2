"""The README.md of an exported model: what it is, and what it was trained on. No torch."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchtitan import __version__

if TYPE_CHECKING:
    from torchtitan.weights.stored_model import StoredModel

_SECTIONS = ("model", "optimizer", "lr_scheduler", "loss", "training", "data", "handlers")
"""Settings that decide the weights."""
_CACHED = re.compile(r"/models--(.+?)--(.+)/snapshots/(\w+)/?$")
"""A repository in the hub's cache: owner, name and commit."""
_NOT_SHOWN = (
    "tokenizer_path",
    "print_after_conversion",
    "dataset_path",
    "dataloader",
    "local_batch_size",
    "enable_cpu_offload",
    "gc_freq",
    "gc_debug",
)
"""Settings of the mesh and the machine, and paths on it."""


def model_card(model: "StoredModel", num_parameters: int, dtype: str) -> str:
    """Return the card, the same for every mesh that the model was trained on."""
    training = model.training
    config: Mapping[str, Any] = training.get("config") or {}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- torchtitan",
        "---",
        "",
        f"# {model.family.name}, {num_parameters / 1e6:,.1f}M parameters",
        "",
        f"Written by torchtitan {__version__} in {dtype}.",
    ]
    if training:
        lines += ["", "## Training", "", *_training(training, config)]
    if config:
        lines += ["", "## Config", "", "```toml", *_config(config), "```"]
    return "\n".join(lines) + "\n"


def _training(training: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    state = training.get("state", {})
    yield f"- Steps: {training['step']:,}"
    if state.get("num_tokens_seen"):
        yield f"- Tokens: {state['num_tokens_seen']:,}"
    section = config.get("training", {})
    sources = (config.get("data") or {}).get("sources") or [section]
    for source in sources:
        names = [source.get(key) for key in ("dataset", "dataset_path") if source.get(key)]
        if names:
            yield f"- Data: {', '.join(map(_public, names))}"
    if section.get("seq_len"):
        yield f"- Sequence length: {section['seq_len']:,}"
    start = (config.get("checkpoint") or {}).get("initial_load_path")
    if start:
        yield f"- Started from: {_public(start)}"
    versions = training.get("versions")
    if isinstance(versions, Mapping):
        yield f"- Versions: {', '.join(f'{name} {of}' for name, of in versions.items())}"


def _public(path: Any) -> str:
    """Return a path without the folders of this machine that it lies in."""
    text = str(path)
    if cached := _CACHED.search(text):
        return f"hf://{cached[1]}/{cached[2]}@{cached[3]}"
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~", ".")) else text


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections that decide the weights, as TOML."""
    for section in _SECTIONS:
        values = config.get(section)
        if not isinstance(values, Mapping):
            continue
        known = {
            k: v for k, v in values.items() if v not in (None, {}, [], -1) and k not in _NOT_SHOWN
        }
        if known:
            yield f"[{section}]"
            yield from (f"{key} = {_toml(value)}" for key, value in known.items())


def _toml(value: Any) -> str:
    """Return a value as TOML; strings and numbers look as in JSON."""
    if isinstance(value, Mapping):
        inside = (f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(inside) + " }"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
