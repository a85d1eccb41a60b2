"""`torchtitan list configs | models | datasets | tokenizers | optimizers | handlers`."""

from collections.abc import Callable

from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.suggest import did_you_mean

USAGE = """usage: torchtitan list [NAME ...]

Names that a config may use, one a line, with a phrase each. Without NAME, all of these:

  configs      the TOMLs that come with the library; `torchtitan config copy` takes their names
  models       model.name, with the choices of model.flavor
  datasets     training.dataset
  tokenizers   model.tokenizer_path
  optimizers   optimizer.name, with the settings
  handlers     model.handlers, with the settings of [handlers.NAME]"""


def run(argv: list[str]) -> int:
    """Print the names that a config may use, one a line, with a phrase each."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    unknown = [name for name in argv if name not in _LISTS]
    if unknown:
        fix = did_you_mean(unknown[0], _LISTS)
        raise ConfigError(Problem(f"list {unknown[0]}", "is not a list", fix))
    for name in argv or _LISTS:
        if len(argv) != 1:
            print(f"{name}:")
        rows = _LISTS[name]()
        width = max((len(row) for row, _ in rows), default=0)
        for row, text in rows:
            print(f"{'' if len(argv) == 1 else '  '}{row:<{width}}  {text}".rstrip())
    return 0


def _configs() -> list[tuple[str, str]]:
    from torchtitan.tools.config_files import description, shipped_configs

    return [(name, description(path)) for name, path in shipped_configs().items()]


def _optimizers() -> list[tuple[str, str]]:
    """The choices of the section, with the settings that are its own."""
    from torchtitan.config.fields import known_keys

    settings = [
        key.last_name
        for key in known_keys().values()
        if key.section == "optimizer" and key.last_name != "name"
    ]
    text = f"settings: {', '.join(settings)}"
    return [(name, text) for name in known_keys()["optimizer.name"].choices]


def _tokenizers() -> list[tuple[str, str]]:
    """What `model.tokenizer_path` may be."""
    return [
        ("bytes", "one token a byte of UTF-8; needs no file"),
        ("tokenizer.json", "a file of the tokenizers library, or the folder that holds it"),
        (
            "tokenizer.model",
            "tiktoken (Llama 3) or sentencepiece (Llama 2), or its folder",
        ),
    ]


def _models() -> list[tuple[str, str]]:
    from torchtitan.models.registry import families

    return [(name, ", ".join(family.flavors)) for name, family in families().items()]


def _datasets() -> list[tuple[str, str]]:
    from torchtitan.data.registry import datasets

    return [(name, entry.description) for name, entry in datasets().items()]


def _handlers() -> list[tuple[str, str]]:
    from torchtitan.handlers.registry import handlers

    return [
        (name, f"settings: {', '.join(entry.settings.model_fields) or 'none'}")
        for name, entry in handlers().items()
    ]


_LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "configs": _configs,
    "models": _models,
    "datasets": _datasets,
    "tokenizers": _tokenizers,
    "optimizers": _optimizers,
    "handlers": _handlers,
}
