"""Model families by name. No torch.

More are added with `register_family`, from a module in `job.custom_import`, or by an entry point of
the group `torchtitan.models` whose value is a `ModelFamily` of the same name.
"""

from typing import Any

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, calling_module
from torchtitan.config.schema import Model
from torchtitan.config.suggest import fix_of_registered
from torchtitan.models.family import ModelFamily
from torchtitan.models.llama2 import FAMILY as LLAMA2
from torchtitan.models.llama3 import FAMILY as LLAMA3
from torchtitan.models.qwen3 import FAMILY as QWEN3
from torchtitan.models.spec import ModelArgs

_ALIASES = {"llama": "llama3"}
"""TorchTitan's first name of the family."""


def _family(name: str, thing: Any) -> ModelFamily:
    if not isinstance(thing, ModelFamily):
        raise TypeError("it is not a ModelFamily")
    if thing.name != name:
        raise TypeError(f"the family is named {thing.name!r}, but its entry point {name!r}")
    return thing


MODELS: Registry[ModelFamily] = Registry("model.name", "torchtitan.models", _family)
for _built_in in (LLAMA3, LLAMA2, QWEN3):
    MODELS.add_built_in(_built_in.name, _built_in)


def families() -> dict[str, ModelFamily]:
    """Return all families that can be imported, by name, the built-in ones first."""
    return MODELS.entries()


def get_family(name: str) -> ModelFamily:
    """Return the family; raise `ConfigError` with the nearest name if there is none."""
    name = name if name in MODELS else _ALIASES.get(name, name)
    family = MODELS.get(name)
    if family is None:
        fix = fix_of_registered(name, families())
        raise ConfigError(ConfigIssue("model.name", "unknown model family", fix, value=name))
    return family


def model_args(section: Model) -> ModelArgs | None:
    """Return the hyper-parameters of `[model]`; None if they are wrong (preflight reports it)."""
    try:
        return get_family(section.name).resolve(section)
    except ConfigError:
        return None


def register_family(family: ModelFamily) -> None:
    """Add a family. Raises `ValueError` if another one has its name."""
    MODELS.register(family.name, family, calling_module())
