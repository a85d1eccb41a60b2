"""`torchtitan list`: the names that a config may use, and who registers them."""

import argparse
import sys
from typing import Any

from torchtitan.commands.config import description
from torchtitan.config.custom_import import import_modules
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import BUILT_IN, Registry
from torchtitan.config.shipped import shipped_configs
from torchtitan.config.suggest import did_you_mean

Rows = list[tuple[str, str]]
_NOT_REGISTERED: dict[str, Rows] = {
    "tokenizers": [
        ("tokenizer.json", "a file of the tokenizers library, or the folder that holds it"),
        ("tokenizer.model", "tiktoken (Llama 3) or sentencepiece (Llama 2), or its folder"),
    ],
    "sinks": [
        ("metrics.jsonl", "always"),
        ("console", "always; metrics.disable_color_printing"),
        ("TensorBoard", "metrics.enable_tensorboard"),
        ("Weights & Biases", "metrics.enable_wandb"),
    ],
}


def run(options: argparse.Namespace) -> int:
    """Print the names, one a line, with a phrase each."""
    if problems := import_modules([n for text in options.modules for n in text.split(",") if n]):
        raise ConfigError(problems)
    known = lists()
    for name in options.names:
        if name not in known:
            fix = did_you_mean(name, known)
            raise ConfigError(ConfigIssue(f"list {name}", "is not a list", fix))
    indent = "" if len(options.names) == 1 else "  "
    for name in options.names or known:
        if indent:
            print(f"{name}:")
        rows = _rows(name, known[name])
        width = max((len(row) for row, _ in rows), default=0)
        for row, text in rows:
            print(f"{indent}{row:<{width}}  {text}".rstrip())
    return 0


def lists() -> dict[str, Registry[Any] | None]:
    """Return the registries by the names of their lists; None for the shipped configs."""
    from torchtitan.data.registry import DATASETS
    from torchtitan.data.tokenizers import TOKENIZERS
    from torchtitan.handlers.masks import MASKS
    from torchtitan.handlers.registry import HANDLERS
    from torchtitan.loss.registry import LOSSES
    from torchtitan.metrics.sinks import SINKS
    from torchtitan.models.registry import MODELS
    from torchtitan.optim.lr_scheduler import SCHEDULES
    from torchtitan.optim.registry import OPTIMIZERS

    return {
        "configs": None,
        "models": MODELS,
        "datasets": DATASETS,
        "tokenizers": TOKENIZERS,
        "losses": LOSSES,
        "optimizers": OPTIMIZERS,
        "schedules": SCHEDULES,
        "sinks": SINKS,
        "handlers": HANDLERS,
        "masks": MASKS,
    }


def _rows(name: str, registry: Registry[Any] | None) -> Rows:
    if registry is None:
        return [(config, description(path)) for config, path in shipped_configs().items()]
    return [(entry, entry_text(registry, entry)) for entry in registry] + _NOT_REGISTERED.get(
        name, []
    )


def entry_text(registry: Registry[Any], name: str) -> str:
    """Describe an entry, with its origin unless it is built in."""
    try:
        text = _describe(registry[name])
    except ConfigError as error:
        print(error, file=sys.stderr)
        text = "cannot be used"
    origin = registry.origin(name)
    return text if origin == BUILT_IN else f"{text} (from {origin})".strip()


def _describe(entry: Any) -> str:
    if hasattr(entry, "flavors"):
        return ", ".join(entry.flavors)
    if hasattr(entry, "description"):
        return entry.description
    if not hasattr(entry, "settings"):
        return (entry.__doc__ or "").strip().partition("\n")[0]
    uses = f"uses {', '.join(entry.uses)}; " if getattr(entry, "uses", ()) else ""
    own = [key for key in entry.settings.model_fields if key not in ("name", "args")]
    return f"{uses}settings: {', '.join(own) or 'none'}"
