"""The model families by name. No torch.

Built-in families are imported when first asked for; others join with `register_family`, from a
module that `job.custom_import` names.
"""

from importlib import import_module

from torchtitan.models.spec import ModelFamily, lookup

_BUILT_IN = ("torchtitan.models.llama3", "torchtitan.models.llama2")
_ALIASES = {"llama": "llama3"}
"""TorchTitan's first name of the family."""
_registered: dict[str, ModelFamily] = {}


def families() -> dict[str, ModelFamily]:
    """All families by name, the built-in ones first."""
    built_in: list[ModelFamily] = [import_module(module).FAMILY for module in _BUILT_IN]
    return {family.name: family for family in built_in} | _registered


def get_family(name: str) -> ModelFamily:
    """The family of this name; `ConfigError` with the nearest name when there is none."""
    known = families()
    name = name if name in known else _ALIASES.get(name, name)
    return lookup(known, name, "model.name", "model family")


def register_family(family: ModelFamily) -> None:
    """Add a family. Raises `ValueError` when another one has its name."""
    if families().get(family.name, family) != family:
        raise ValueError(f"a model family named {family.name!r} exists already")
    _registered[family.name] = family
