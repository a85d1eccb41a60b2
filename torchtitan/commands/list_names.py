"""`torchtitan list`: the names that a config may use, and who gives those that are not built in."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchtitan.config.custom_import import KEY as CUSTOM_IMPORT
from torchtitan.config.custom_import import import_modules
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import BUILT_IN, Registry
from torchtitan.config.suggest import did_you_mean

if TYPE_CHECKING:
    from torchtitan.optim.lr_scheduler import ScheduleEntry
    from torchtitan.optim.registry import OptimizerEntry

Rows = list[tuple[str, str]]
_FLAG = f"--{CUSTOM_IMPORT}"
USAGE = f"""usage: torchtitan list [NAME ...] [{_FLAG} MODULE ...]

Names that a config may use, one a line, with a phrase each, and from whom where they are not built
in; with what MODULE registers, too. Without NAME, all of these:

  configs      the TOMLs that come with the library; `torchtitan config copy` takes their names
  models       model.name, with the choices of model.flavor
  datasets     training.dataset
  tokenizers   model.tokenizer_path
  losses       loss.name, with the settings of [loss.args]
  optimizers   optimizer.name, with the settings and those of [optimizer.args]
  schedules    lr_scheduler.name
  sinks        metrics.sinks, and the switches of what is built in
  handlers     model.handlers, with the settings of [handlers.NAME]
  masks        handlers.flex_attention.masks"""


def run(argv: list[str]) -> int:
    """Print the names, one a line, with a phrase each."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    wanted, modules = _split(argv)
    unknown = [name for name in wanted if name not in _LISTS]
    if unknown:
        fix = did_you_mean(unknown[0], _LISTS)
        raise ConfigError(ConfigIssue(f"list {unknown[0]}", "is not a list", fix))
    problems = import_modules(modules)
    if problems:
        raise ConfigError(problems)
    for name in wanted or _LISTS:
        if len(wanted) != 1:
            print(f"{name}:")
        rows = _LISTS[name]()
        width = max((len(row) for row, _ in rows), default=0)
        for row, text in rows:
            print(f"{'' if len(wanted) == 1 else '  '}{row:<{width}}  {text}".rstrip())
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The lists that are asked for, and the modules to import before."""
    text = [part for word in argv for part in word.partition("=")[::2] if part]
    flags = {_FLAG, _FLAG.replace("_", "-")}  # as everywhere on the command line
    place = next((index for index, part in enumerate(text) if part in flags), len(text))
    return text[:place], [name for part in text[place + 1 :] for name in part.split(",")]


def _configs() -> Rows:
    from torchtitan.commands.config_files import description
    from torchtitan.config.shipped import shipped_configs

    return [(name, description(path)) for name, path in shipped_configs().items()]


def _optimizers() -> Rows:
    """With what they use of [optimizer], and what they have of their own."""
    from torchtitan.optim.registry import OPTIMIZERS

    def describe(entry: "OptimizerEntry") -> str:
        own = ", ".join(entry.settings.model_fields)
        uses = f"uses {', '.join(entry.uses)}" if entry.uses else ""
        return "; ".join(filter(None, [uses, own and f"args: {own}"])) or "settings: none"

    return rows_of(OPTIMIZERS, describe)


def _schedules() -> Rows:
    """Those of others have their settings in [lr_scheduler.args]."""
    from torchtitan.optim.lr_scheduler import SCHEDULES

    def describe(entry: "ScheduleEntry") -> str:
        keys = [key for key in entry.settings.model_fields if key not in ("name", "args")]
        return f"settings: {', '.join(keys) or 'none'}"

    return rows_of(SCHEDULES, describe)


def _sinks() -> Rows:
    """The library's own, which have switches, and those that `metrics.sinks` may name."""
    from torchtitan.metrics.sink_registry import SINKS

    switches = [
        ("metrics.jsonl", "always"),
        ("console", "always; metrics.disable_color_printing"),
        ("TensorBoard", "metrics.enable_tensorboard"),
        ("Weights & Biases", "metrics.enable_wandb"),
    ]
    return switches + rows_of(SINKS, lambda entry: _settings(entry.settings))


def _tokenizers() -> Rows:
    """What `model.tokenizer_path` may be."""
    from torchtitan.data.tokenizers import TOKENIZERS

    texts = {"bytes": "one token a byte of UTF-8; needs no file"}
    registered = rows_of(TOKENIZERS, lambda factory: _first_line(factory))
    return [
        *((name, texts.get(name, text)) for name, text in registered),
        ("tokenizer.json", "a file of the tokenizers library, or the folder that holds it"),
        (
            "tokenizer.model",
            "tiktoken (Llama 3) or sentencepiece (Llama 2), or its folder",
        ),
    ]


def _models() -> Rows:
    from torchtitan.models.registry import MODELS

    return rows_of(MODELS, lambda family: ", ".join(family.flavors))


def _datasets() -> Rows:
    from torchtitan.data.registry import DATASETS

    return rows_of(DATASETS, lambda entry: entry.description)


def _handlers() -> Rows:
    from torchtitan.handlers.registry import HANDLERS

    return rows_of(HANDLERS, lambda entry: _settings(entry.settings))


def _masks() -> Rows:
    from torchtitan.handlers.masks import MASKS

    return rows_of(MASKS, lambda entry: entry.description)


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _losses() -> Rows:
    from torchtitan.loss.registry import LOSSES

    return rows_of(LOSSES, lambda entry: _settings(entry.settings))


def _settings(section: type) -> str:
    return f"settings: {', '.join(section.model_fields) or 'none'}"  # type: ignore[attr-defined]


def rows_of(registry: Registry, describe: Callable) -> Rows:  # type: ignore[type-arg]
    """A row for each name: what it is, and from whom, unless that is this library."""
    rows = []
    for name in registry:
        origin = registry.origin(name)
        try:
            text = describe(registry[name])
        except ConfigError as error:
            print(error, file=sys.stderr)
            text = "cannot be used"
        source = "" if origin == BUILT_IN else f"(from {origin})"
        rows.append((name, " ".join(filter(None, [text, source]))))
    return rows


_LISTS: dict[str, Callable[[], Rows]] = {
    "configs": _configs,
    "models": _models,
    "datasets": _datasets,
    "tokenizers": _tokenizers,
    "losses": _losses,
    "optimizers": _optimizers,
    "schedules": _schedules,
    "sinks": _sinks,
    "handlers": _handlers,
    "masks": _masks,
}
