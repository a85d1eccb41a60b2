"""The handler `freeze`: exclude parameters from training.

A frozen parameter has no gradient and no optimizer state. It stays in checkpoints under its name.
The globs are matched on the whole model, before it is parallelised.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.suggest import fix_of_glob
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings
from torchtitan.handlers.settings import FreezeSettings


class FreezeHandler(ModelHandler):
    """Freezes by name. A tied parameter has several names; one match is enough."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self._settings: FreezeSettings = handler_settings(job_config, "freeze")

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Find globs that match nothing, and a model with nothing left to train."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        settings = self._settings
        problems = []
        for key, globs in (("patterns", settings.patterns), ("only", settings.only)):
            for index, glob in enumerate(globs):
                if not any(fnmatchcase(name, glob) for name in names):
                    problem, fix = "it matches no parameter of the model", fix_of_glob(glob, names)
                    key_of_glob = f"handlers.freeze.{key}[{index}]"
                    problems.append(ConfigIssue(key_of_glob, problem, fix, value=glob))
        if not problems and len(self._frozen(model)) == len(list(model.parameters())):
            problem, fix = "it freezes every parameter, so nothing is trained", "freeze less"
            problems.append(ConfigIssue("handlers.freeze.patterns", problem, fix))
        return problems

    def convert(self, model: nn.Module) -> None:
        """Switch gradients off. Raises ConfigError for the problems of `check`."""
        problems = self.check(model)
        if problems:
            raise ConfigError(problems)
        for parameter in self._frozen(model):
            parameter.requires_grad_(False)

    def _frozen(self, model: nn.Module) -> list[nn.Parameter]:
        settings = self._settings
        matching = {
            parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if _matches(name, settings.patterns or settings.only)
        }
        return [p for p in model.parameters() if (p in matching) == bool(settings.patterns)]


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
