"""The linears of a model, swapped for others that compute in another format.

Names and shapes of parameters stay, so that initial weights, checkpoints and the optimizer do not
know of it. Only modules whose class is `nn.Linear` itself are swapped: one of a class of its own,
as the head, computes something of its own.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import nn

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.suggest import did_you_mean
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.registry import handler_settings
from torchtitan.parallel.tensor_parallel import ParallelStyle

logger = logging.getLogger(__name__)
T = TypeVar("T")


def linears_of(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those that may be swapped, by name; a tied one once."""
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


def swap_linears(
    model: nn.Module,
    swap: Callable[[str, nn.Linear], nn.Linear],
    is_wanted: Callable[[str, nn.Linear], bool],
) -> list[str]:
    """Replace each wanted linear by `swap(name, linear)`, in place; their names in order.

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


class LinearHandler:
    """A handler that swaps linears; a subclass says for what, in `swap`."""

    name: str
    multiple: int
    """What both dimensions of a matrix have to be a multiple of."""
    marks: tuple[str, ...] = ()
    """What may stand in `filter_fqns` and is no part of a name."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self.settings = handler_settings(job_config, self.name)
        self.dims = parallel_dims
        self.swapped: dict[str, tuple[int, int]] = {}
        """Shapes, outputs first, of the linears that were swapped, by name."""

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The module in the linear's place; it may be the same one, changed."""
        raise NotImplementedError

    def leaves_out(self, name: str, linear: nn.Linear) -> bool:
        """Whether there is a reason of the subclass's own to leave a linear as it is."""
        return False

    def check(self, model: nn.Module) -> list[ConfigIssue]:
        """Filters that leave out nothing, which are misspelled; and a model without any linear to
        swap."""
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
        """Swap the linears; tell once how many, and which do not fit."""
        problems = self.check(model)
        if problems:
            raise ConfigError(problems)
        self.swapped, filtered, unfit = self._sorted(model)
        swap_linears(model, self.swap, lambda name, _: name in self.swapped)
        words = [f"{self.name}: {len(self.swapped)} linears"]
        words += [f"{filtered} left as they are by filter_fqns"] * bool(filtered)
        if unfit:
            shown = ", ".join(unfit[:3]) + ", ..." * (len(unfit) > 3)
            words.append(
                f"{len(unfit)} left as they are, since a dimension is no multiple of"
                f" {self.multiple} ({shown})"
            )
        logger.info("; ".join(words))

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Refuse parts of matrices that do not fit; which linears are swapped must not depend on
        the mesh."""
        degree = self.dims.tp
        for name, (outputs, inputs) in self.swapped.items():
            if name not in plan:
                continue  # of another stage
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

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""

    def _filters(self) -> list[str]:
        return [text for text in self.settings.filter_fqns if text not in self.marks]

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
            f"it finds no linear: {filtered} are left out by filter_fqns, and {len(unfit)} have a"
            f" dimension that is no multiple of {self.multiple}"
        )
        fix = "leave it out, or change the model or the filter"
        return ConfigIssue("model.handlers", problem, fix, self.name)
