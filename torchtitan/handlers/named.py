"""A handler with its name, so that errors inside it say which handler they come from."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import HANDLERS, require_handler
from torchtitan.models.spec import InitRule
from torchtitan.parallel.tensor_parallel import ParallelStyle
from torchtitan.weights.made_tensors import MadeTensors

_NO_VALUES = (
    ' (convert runs under torch.device("meta"): tensors that it makes have no values, unless they'
    ' are made with device="cpu")'
)


class HandlerError(RuntimeError):
    """An error inside a handler; the original error is its cause."""


class NamedHandler:
    """Calls a handler's hooks, checks what they return, and raises `HandlerError` for their errors.

    ConfigError passes through: it says itself what to fix. The methods are those of `ModelHandler`.
    """

    def __init__(self, name: str, job_config: JobConfig, parallel_dims: ParallelDims):
        self.name = name
        self.added: frozenset[str] = frozenset()
        """Parameters and buffers that `convert` added to the model."""
        self.kind: type[ModelHandler] | None = None
        with self._errors_of("__init__"):
            self.kind = HANDLERS[name].load()
            require_handler(name, self.kind)
            self._has_state = self.kind.state_dict is not ModelHandler.state_dict
            if self._has_state == (self.kind.load_state_dict is ModelHandler.load_state_dict):
                raise TypeError("it has only one of state_dict and load_state_dict")
            self.handler = self.kind(job_config, parallel_dims)

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Return the problems that only the model shows."""
        return self._issues("check", model)

    def check_start(self, model: nn.Module) -> list[ConfigIssue]:
        """Return the problems of what `initialize_added` will read."""
        return self._issues("check_start", model)

    def _issues(self, hook: str, model: nn.Module) -> list[ConfigIssue]:
        with self._errors_of(hook):
            found = list(getattr(self.handler, hook)(model))
            for item in found:
                if not isinstance(item, ConfigIssue):
                    raise TypeError(f"{item!r} is not a ConfigIssue")
        return found

    def convert(self, model: nn.Module) -> None:
        """Change the model in place."""
        with self._errors_of("convert"):
            returned: Any = self.handler.convert(model)  # type: ignore[func-returns-value]
            if isinstance(returned, nn.Module) and returned is not model:
                raise TypeError("it returns another model; it must change the given one in place")

    def init_rule(self, name: str) -> InitRule | None:
        """Return the handler's rule for a parameter or buffer, None to leave it to the model."""
        with self._errors_of("init_rule"):
            rule = self.handler.init_rule(name)
            if not isinstance(rule, InitRule | None):
                raise TypeError(f"it returns {rule!r} for {name}, not an InitRule or None")
        return rule

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Change the tensor-parallel styles in place."""
        with self._errors_of("extend_tp_plan"):
            self.handler.extend_tp_plan(plan)

    def transform_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """Return the values to use in place of a loaded `tensor`, of the same shape."""
        with self._errors_of("transform_loaded"):
            changed = self.handler.transform_loaded(name, tensor)
            if changed.shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(changed.shape)}")
        return changed

    def made_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, MadeTensors]:
        """Return the tensors that are made of a stored matrix, by its name."""
        with self._errors_of("made_of"):
            return self.handler.made_of(tensors)

    @property
    def adds_adapters(self) -> bool:
        """Return whether checkpoints leave out what is not trained, see `ModelHandler`."""
        return self.handler.adds_adapters

    @property
    def start_files(self) -> tuple[Path, ...]:
        """The files from which `initialize_added` takes values."""
        return self.handler.start_files

    def initialize_added(self, model: nn.Module | list[nn.Module]) -> None:
        """Let the handler change the first values of what it added."""
        with self._errors_of("initialize_added"):
            self.handler.initialize_added(model)

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        """Tell the handler that the weights are in place."""
        with self._errors_of("after_load"):
            self.handler.after_load(model)

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Run the hook before the optimizer step."""
        with self._errors_of("pre_optimizer_hook"):
            self.handler.pre_optimizer_hook(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Run the hook after the optimizer step."""
        with self._errors_of("post_optimizer_hook"):
            self.handler.post_optimizer_hook(model)

    def without_adapters(
        self, model: nn.Module | list[nn.Module]
    ) -> AbstractContextManager[object]:
        """Return a context in which the model computes without what the handler adds."""
        with self._errors_of("without_adapters"):
            return self.handler.without_adapters(model)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state by name, None for a handler without state."""
        if not self._has_state:
            return None
        with self._errors_of("state_dict"):
            state = self.handler.state_dict()
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise TypeError("it has to return a dict with names as keys")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the handler its stored state."""
        with self._errors_of("load_state_dict"):
            self.handler.load_state_dict(state)

    @contextmanager
    def _errors_of(self, hook: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, HandlerError):
            raise
        except Exception as error:
            module = HANDLERS.origin(self.name) if self.kind is None else self.kind.__module__
            where = f"the handler {self.name} ({module}), in {hook}"
            hint = _NO_VALUES if re.search(r"\bmeta\b", str(error)) else ""
            raise HandlerError(f"{where}: {type(error).__name__}: {error}{hint}") from error
