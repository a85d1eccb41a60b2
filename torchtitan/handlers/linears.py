"""Base of the handlers that replace a model's linears by low-precision ones.

Names and shapes of parameters stay, so initial weights, checkpoints and the optimizer are not
affected. Only modules whose class is `nn.Linear` itself are swapped, not subclasses such as the
head.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import nn

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.suggest import did_you_mean
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings
from torchtitan.parallel.tensor_parallel import ParallelStyle

logger = logging.getLogger(__name__)
T = TypeVar("T")


def linears_of(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linears that may be swapped, with their names; a tied one once."""
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


def swap_linears(
    model: nn.Module,
    swap: Callable[[str, nn.Linear], nn.Linear],
    is_wanted: Callable[[str, nn.Linear], bool],
) -> list[str]:
    """Replace each wanted linear by `swap(name, linear)`, in place; return their names in order.

    A linear, or a weight, that has several names stays one. An error in `swap` is raised as
    RuntimeError that names the linear.
    """
    places = _names_by_object(model.named_modules(remove_duplicate=False))
    shared = _names_by_object(model.named_parameters(remove_duplicate=False))
    names = [name for name, linear in linears_of(model) if is_wanted(name, linear)]
    for name in names:
        linear = model.get_submodule(name)
        try:
            swapped = swap(name, linear)  # type: ignore[arg-type]
        except ConfigError:
            raise
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        for place in places[linear]:
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, swapped)
    for first, *others in shared.values():  # the swap may have made new parameters
        for other in others:
            parent, _, last = other.rpartition(".")
            setattr(model.get_submodule(parent), last, model.get_parameter(first))
    return names


def _names_by_object(named: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    names: dict[T, list[str]] = {}
    for name, thing in named:
        names.setdefault(thing, []).append(name)
    return names


class LinearHandler(ModelHandler):
    """A handler that swaps linears; subclasses define `swap`."""

    name: str
    multiple: int
    """Both dimensions of a matrix must be multiples of this."""
    keywords: tuple[str, ...] = ()
    """Entries of `filter_fqns` that are not parts of names."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self.settings = handler_settings(job_config, self.name)
        self.dims = parallel_dims
        self.swapped: dict[str, tuple[int, int]] = {}
        """Shapes `(outputs, inputs)` of the swapped linears, by name."""

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return the module in the linear's place; may be the same one, changed."""
        raise NotImplementedError

    def leaves_out(self, name: str, linear: nn.Linear) -> bool:
        """Return True for a linear that the subclass wants to leave as it is."""
        return False

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Find filters that match nothing, and a model without any linear to swap."""
        names = [name for name, _ in model.named_modules()]
        problems = []
        for text in self._filters():
            if not any(text in name for name in names):
                fix = did_you_mean(text, {part for name in names for part in name.split(".")})
                key = f"handlers.{self.name}.filter_fqns"
                problems.append(ConfigIssue(key, "is part of no module's name", fix, text))
        if not problems:
            wanted, filtered, unfit = self._sorted(model)
            problems += [self._nothing_left(filtered, unfit)] * (not wanted)
        return problems

    def convert(self, model: nn.Module) -> None:
        """Swap the linears, and log how many are swapped and which do not fit."""
        problems = self.check(model)
        if problems:
            raise ConfigError(problems)
        self.swapped, filtered, unfit = self._sorted(model)
        swap_linears(model, self.swap, lambda name, _: name in self.swapped)
        summary = [f"{self.name}: {len(self.swapped)} linears"]
        summary += [f"{filtered} skipped by filter_fqns"] * bool(filtered)
        if unfit:
            shown = ", ".join(unfit[:3]) + ", ..." * (len(unfit) > 3)
            summary.append(
                f"{len(unfit)} skipped because a dimension is not a multiple of"
                f" {self.multiple} ({shown})"
            )
        logger.info("; ".join(summary))

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Refuse shards of matrices that do not fit: the mesh must not change what is swapped."""
        degree = self.dims.tp
        for name, (outputs, inputs) in self.swapped.items():
            if name not in plan:
                continue  # on another stage
            part = plan[name].part_of(outputs, inputs, degree)
            if any(size % self.multiple for size in part):
                table = f"handlers.{self.name}.filter_fqns"
                problem = (
                    f"the part of {name} on each rank is {part[0]} x {part[1]}, and the handler"
                    f" {self.name} needs multiples of {self.multiple}"
                )
                fix = f'lower it, or add "{name.rpartition(".")[2]}" to {table}'
                raise ConfigError(
                    ConfigIssue("parallelism.tensor_parallel_degree", problem, fix, degree)
                )

    def _filters(self) -> list[str]:
        return [text for text in self.settings.filter_fqns if text not in self.keywords]

    def _sorted(self, model: nn.Module) -> tuple[dict[str, tuple[int, int]], int, list[str]]:
        """Shapes of the linears to swap, by name; how many are left out; which do not fit."""
        filters, filtered = self._filters(), 0
        wanted: dict[str, tuple[int, int]] = {}
        unfit: list[str] = []
        for name, linear in linears_of(model):
            if any(text in name for text in filters) or self.leaves_out(name, linear):
                filtered += 1
            elif linear.in_features % self.multiple or linear.out_features % self.multiple:
                unfit.append(name)
            else:
                wanted[name] = linear.out_features, linear.in_features
        return wanted, filtered, unfit

    def _nothing_left(self, filtered: int, unfit: Sequence[str]) -> ConfigIssue:
        problem = (
            f"it finds no linear to convert: filter_fqns skips {filtered}, and {len(unfit)} have a"
            f" dimension that is not a multiple of {self.multiple}"
        )
        fix = "leave it out, or change the model or the filter"
        return ConfigIssue("model.handlers", problem, fix, self.name)
