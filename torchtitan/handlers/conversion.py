"""Apply the handlers to a model on the meta device, and find how each parameter is initialised.

A family's `init_rule` knows the family's own parameters. It is never asked about one that a handler
adds: it could only guess, and a wrong guess trains silently.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.models.spec import InitRule, LanguageModel
from torchtitan.utils.dtypes import default_dtype

_MAX_LISTED = 3


@dataclass(frozen=True)
class InitRules:
    """The init rules of a converted model's parameters, and of the buffers that handlers add."""

    model: LanguageModel
    handlers: Sequence[NamedHandler]
    added: dict[str, NamedHandler]
    """Parameters and buffers that the family's model lacks, with the handler that added each."""

    def __call__(self, name: str) -> InitRule:
        """Return the rule of the last listed handler that gives one, else the model's."""
        rule = self.of_handlers(name)
        return self.model.init_rule(name) if rule is None else rule

    def of_handlers(self, name: str) -> InitRule | None:
        """Return the rule of the last listed handler that gives one."""
        rules = (handler.init_rule(name) for handler in reversed(self.handlers))
        return next((rule for rule in rules if rule is not None), None)


def convert_model(
    model: LanguageModel, handlers: Sequence[NamedHandler], dtype: torch.dtype
) -> InitRules:
    """Let the handlers change `model` in place, in order, and return the init rules.

    What handlers create is on the meta device and by default of type `dtype`.

    Raises:
        HandlerError: a handler keeps a tensor as a plain attribute of a module; nothing would ever
            give it values.
        ConfigError: an added parameter or buffer has no init rule, or nothing is left to train.
    """
    assert isinstance(model, nn.Module)
    own = _names(model)
    origins: dict[str, NamedHandler] = {}
    for handler in handlers:
        names, without_values = _names(model), _unregistered(model)
        with torch.device("meta"), default_dtype(dtype):
            handler.convert(model)
        kept = [place for place in _unregistered(model) if place not in without_values]
        if kept:
            raise HandlerError(
                f"the handler {handler.name}, in convert: {kept[0]} is a tensor on the meta device,"
                " which has no values. Register it as a buffer that init_rule and after_load fill,"
                ' or make it with device="cpu"'
            )
        origins |= dict.fromkeys(_names(model).keys() - names.keys(), handler)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problem, names_of = "leave no parameter to train", [handler.name for handler in handlers]
        raise ConfigError(ConfigIssue("model.handlers", problem, "freeze less", names_of))
    added = {name: origins[name] for name in _names(model) if name not in own}
    for handler in handlers:
        handler.added = frozenset(name for name, origin in added.items() if origin is handler)
    rules = InitRules(model, handlers, added)
    missing = [name for name in added if rules.of_handlers(name) is None]
    if missing:
        shown = ", ".join(missing[:_MAX_LISTED])
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        problem = f"it adds {shown}{more} to the model, and no handler gives an init rule for it"
        fix = "give the handler an init_rule(name) that returns an InitRule (docs/guides/own_handler.md)"
        raise ConfigError(ConfigIssue("model.handlers", problem, fix, added[missing[0]].name))
    return rules


def _names(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _unregistered(model: nn.Module) -> list[str]:
    """Return tensors on the meta device that are neither parameters nor buffers."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
