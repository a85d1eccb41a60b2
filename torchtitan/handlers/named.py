"""A handler with its name, so that an error inside it says whose it is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.protocol import ModelHandler
from torchtitan.handlers.registry import HANDLERS
from torchtitan.models.spec import InitRule
from torchtitan.parallel.tensor_parallel import ParallelStyle

_NO_VALUES = (
    ' (convert runs under torch.device("meta"): tensors that it makes have no values, unless they'
    ' are made with device="cpu")'
)


class HandlerError(RuntimeError):
    """A handler raised; the cause is what."""


class NamedHandler:
    """Calls a handler's hooks, and raises `HandlerError` for what they raise, but for ConfigError,
    which says itself what to mend."""

    def __init__(self, name: str, job_config: JobConfig, parallel_dims: ParallelDims):
        self.name = name
        self.added: frozenset[str] = frozenset()
        """Parameters and buffers that `convert` has added to the family's model."""
        with self._naming("__init__"):
            self.handler: ModelHandler = HANDLERS[name].load()(job_config, parallel_dims)
            have = [hasattr(self.handler, hook) for hook in ("state_dict", "load_state_dict")]
            if any(have) and not all(have):
                raise TypeError("it has only one of state_dict and load_state_dict")

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """See `torchtitan.handlers.protocol`; nothing where the handler has none."""
        found: list[ConfigIssue] = []
        if hasattr(self.handler, "check"):
            with self._naming("check"):
                found = list(self.handler.check(model))
                strange = [item for item in found if not isinstance(item, ConfigIssue)]
                if strange:
                    raise TypeError(f"{strange[0]!r} is no ConfigIssue")
        return found

    def convert(self, model: nn.Module) -> None:
        """See `ModelHandler`."""
        with self._naming("convert"):
            returned: Any = self.handler.convert(model)  # type: ignore[func-returns-value]
            if isinstance(returned, nn.Module) and returned is not model:
                raise TypeError("it returns another model: what it is given has to be changed")

    def init_rule(self, name: str) -> InitRule | None:
        """See `torchtitan.handlers.protocol`; None where the handler gives none."""
        if not hasattr(self.handler, "init_rule"):
            return None
        with self._naming("init_rule"):
            rule: InitRule | None = self.handler.init_rule(name)
            if not isinstance(rule, InitRule | None):
                raise TypeError(f"it returns {rule!r} for {name}: it has to be an InitRule or None")
        return rule

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """See `ModelHandler`."""
        with self._naming("pre_optimizer_hook"):
            self.handler.pre_optimizer_hook(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """See `ModelHandler`."""
        with self._naming("post_optimizer_hook"):
            self.handler.post_optimizer_hook(model)

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        """See `torchtitan.handlers.protocol`; nothing where the handler has none."""
        if hasattr(self.handler, "after_load"):
            with self._naming("after_load"):
                self.handler.after_load(model)

    def state_dict(self) -> dict[str, Any] | None:
        """See `torchtitan.handlers.protocol`; None where the handler keeps no state."""
        if not hasattr(self.handler, "state_dict"):
            return None
        with self._naming("state_dict"):
            state: dict[str, Any] = self.handler.state_dict()
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise TypeError("it has to return a dict with names as keys")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `torchtitan.handlers.protocol`."""
        with self._naming("load_state_dict"):
            self.handler.load_state_dict(state)  # type: ignore[attr-defined]

    def transform_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """See `torchtitan.handlers.protocol`; `tensor` itself where the handler has none."""
        if not hasattr(self.handler, "transform_loaded"):
            return tensor
        with self._naming("transform_loaded"):
            changed: Tensor = self.handler.transform_loaded(name, tensor)
            if changed.shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(changed.shape)}")
        return changed

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """See `torchtitan.handlers.protocol`; nothing where the handler has none."""
        if hasattr(self.handler, "extend_tp_plan"):
            with self._naming("extend_tp_plan"):
                self.handler.extend_tp_plan(plan)

    @contextmanager
    def _naming(self, hook: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, HandlerError):
            raise
        except Exception as error:
            handler = getattr(self, "handler", None)
            module = HANDLERS.origin(self.name) if handler is None else type(handler).__module__
            where = f"the handler {self.name} ({module}), in {hook}"
            hint = _NO_VALUES if re.search(r"\bmeta\b", str(error)) else ""
            raise HandlerError(f"{where}: {type(error).__name__}: {error}{hint}") from error
