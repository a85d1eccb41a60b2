"""The stages of a pipeline: which modules each has, and which rank holds it. No torch.

Stages are consecutive runs of the model's top-level modules. A balanced split counts layers: each
block is one, the embedding and the head are as many as their parameters weigh, and the heaviest
stage becomes as light as possible, because the other stages wait for it. Several stages per rank
shorten the pipeline bubble: either in loops (of 2 ranks the first holds stages 0 and 2), or in the
shape of a V (stages 0 and 3), where the first rank also holds the last stage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import Parallelism
from torchtitan.config.suggest import did_you_mean
from torchtitan.parallel.pipeline.schedules import CSV_KEY, SCHEDULES, read_schedule

if TYPE_CHECKING:
    from torch import nn

NAMES_KEY = "parallelism.module_fqns_per_model_part"
SPLIT_KEY = "parallelism.pipeline_parallel_split_points"
LAYERS_KEY = "parallelism.pipeline_parallel_layers_per_stage"
DEGREE_KEY = "parallelism.pipeline_parallel_degree"
SCHEDULE_KEY = "parallelism.pipeline_parallel_schedule"
FIRST_KEY = "parallelism.pipeline_parallel_first_stage_less_layers"
LAST_KEY = "parallelism.pipeline_parallel_last_stage_less_layers"


@dataclass(frozen=True)
class PipelinePlan:
    """The stages of a pipeline in the order of the forward."""

    stages: tuple[tuple[str, ...], ...]
    """The names of each stage's modules."""
    stage_to_rank: tuple[int, ...]
    """The rank along the pipeline that holds each stage."""
    tied: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By first name, the weights that two stages share (`find_tied_weights`), with these stages."""

    @property
    def layers(self) -> list[int]:
        """Layers of each stage."""
        return [sum(map(_is_block, stage)) for stage in self.stages]

    def held_by(self, rank: int) -> list[int]:
        """Return the stages of a rank, in order."""
        return [stage for stage, holder in enumerate(self.stage_to_rank) if holder == rank]

    def stages_with(self, name: str) -> list[int]:
        """Return the stages that hold a parameter of this full name: all, if no module has it."""
        module = self.module_of(name)
        if not module:
            return list(range(len(self.stages)))
        return [number for number, modules in enumerate(self.stages) if module in modules]

    def module_of(self, name: str) -> str:
        """Return the module that a parameter of this full name is in; "" for none."""
        modules = (module for stage in self.stages for module in stage)
        return next((module for module in modules if f"{name}.".startswith(f"{module}.")), "")

    def tied_modules(self, stage: int) -> list[str]:
        """Return the modules of other stages that hold a weight which `stage` shares."""
        names = [name for name, stages in self.tied.items() if stage in stages]
        modules = dict.fromkeys(map(self.module_of, names))
        return [module for module in modules if module not in self.stages[stage]]


def plan_pipeline(
    section: Parallelism, modules: Mapping[str, int], num_microbatches: int
) -> PipelinePlan:
    """Return the stages of a model with these `modules` (`ModelArgs.modules`).

    Reads the schedule's file, if there is one. Raises `ConfigError` for keys, or a file, that fit
    neither the model nor each other.
    """
    degree, path = section.pipeline_parallel_degree, section.pipeline_parallel_schedule_csv
    blocks = [name for name in modules if _is_block(name)]
    if not blocks:
        problem = "this model cannot be split into stages"
        raise ConfigError(ConfigIssue(DEGREE_KEY, problem, "set it to 1", degree))
    if path:
        stage_to_rank = read_schedule(path, degree, num_microbatches).stage_to_rank
    else:
        stage_to_rank = _stage_to_rank(section, len(blocks))
    if section.module_fqns_per_model_part:
        stages = _named_stages(section, modules)
    elif section.pipeline_parallel_split_points:
        stages = _split_stages(section, modules)
    else:
        stages = _balanced_stages(section, modules, blocks, len(stage_to_rank))
    if len(stages) != len(stage_to_rank):
        key = NAMES_KEY if section.module_fqns_per_model_part else SPLIT_KEY
        problem = f"makes {len(stages)} stages, and the schedule's file has {len(stage_to_rank)}"
        raise ConfigError(ConfigIssue(key, problem, f"make {len(stage_to_rank)} stages"))
    return PipelinePlan(tuple(map(tuple, stages)), stage_to_rank)


def find_tied_weights(
    plan: PipelinePlan, model: "nn.Module", degree: int
) -> dict[str, tuple[int, int]]:
    """Return the weights that two stages share, by their first name, with these stages.

    `model` is whole. Raises `ConfigError` for parameters that several stages would each train a
    copy of: a second stage can keep a copy of a module such as the embedding, of which it shares
    every parameter, and not of a whole block.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    spread: dict[str, list[int]] = {}
    for names in names_of.values():
        stages = sorted({stage for name in names for stage in plan.stages_with(name)})
        if len(stages) > 1:
            spread[names[0]] = stages
    tied = {}
    for name, stages in spread.items():
        module = plan.module_of(name)
        inside = [names[0] for names in names_of.values() if names[0].startswith(f"{module}.")]
        if not module or len(stages) > 2 or any(spread.get(other) != stages for other in inside):
            shared = next(names for names in names_of.values() if names[0] == name)
            raise ConfigError(_torn(shared, stages, degree))
        tied[name] = (stages[0], stages[1])
    return tied


def _torn(names: list[str], stages: list[int], degree: int) -> ConfigIssue:
    copies = f"stages {_some([str(stage) for stage in stages])} would each train a copy"
    if len(names) == 1:
        problem = f"{names[0]} is in no module of ModelArgs.modules(), so {copies}"
        fix = "set it to 1, or put the parameter into one of these modules"
    else:
        problem = f"{_some(names)} are one parameter, and {copies}"
        fix = f"set it to 1, or keep what is shared in one stage ({NAMES_KEY})"
    return ConfigIssue(DEGREE_KEY, problem, fix, degree)


def number_of_stages(section: Parallelism, num_layers: int) -> int:
    """Return the stages of all ranks together, by the keys of the split or by the schedule.

    Layers per stage are counted as TorchTitan does: the embedding and the head are one layer each
    unless their keys say otherwise.
    """
    if section.module_fqns_per_model_part:
        return len(section.module_fqns_per_model_part)
    if section.pipeline_parallel_split_points:
        return len(section.pipeline_parallel_split_points) + 1
    if section.pipeline_parallel_layers_per_stage is not None:
        first = section.pipeline_parallel_first_stage_less_layers
        last = section.pipeline_parallel_last_stage_less_layers
        counted = num_layers + sum(1 if end is None else end for end in (first, last))
        return math.ceil(counted / section.pipeline_parallel_layers_per_stage)
    per_rank = SCHEDULES[section.pipeline_parallel_schedule].stages_per_rank or 2
    return section.pipeline_parallel_degree * per_rank


def _stage_to_rank(section: Parallelism, num_layers: int) -> tuple[int, ...]:
    """Return the rank of each stage.

    Raises `ConfigError` for a number of stages that the schedule cannot have.
    """
    degree, count = section.pipeline_parallel_degree, number_of_stages(section, num_layers)
    schedule = SCHEDULES[section.pipeline_parallel_schedule]
    per_rank, left_over = divmod(count, degree)
    exactly = schedule.stages_per_rank
    if left_over or (per_rank < 2 and exactly is None) or exactly not in (None, per_rank):
        raise ConfigError(_wrong_number_of_stages(section, count))
    by_hand = section.module_fqns_per_model_part or section.pipeline_parallel_split_points
    if count > num_layers and not by_hand:
        # Before anything of that length is made: the degree may be a typing error.
        raise ConfigError(_too_many_stages(section, count, num_layers))
    if schedule.is_v:
        return (*range(degree), *reversed(range(degree)))
    return tuple(stage % degree for stage in range(count))


def _wrong_number_of_stages(section: Parallelism, count: int) -> ConfigIssue:
    degree, schedule = section.pipeline_parallel_degree, section.pipeline_parallel_schedule
    exactly = SCHEDULES[schedule].stages_per_rank
    wanted = f"{exactly * degree}" if exactly else f"{2 * degree}, {3 * degree} or so on"
    problem = f"makes {count} stages, and {schedule} on {degree} pipeline ranks needs {wanted}"
    other = "or choose another schedule"
    if section.module_fqns_per_model_part:
        return ConfigIssue(NAMES_KEY, problem, f"list the modules of {wanted} stages, {other}")
    if section.pipeline_parallel_split_points:
        return ConfigIssue(SPLIT_KEY, problem, f"name one fewer module than stages, {other}")
    layers = section.pipeline_parallel_layers_per_stage
    return ConfigIssue(LAYERS_KEY, problem, "leave it unset for a balanced split", layers)


def _too_many_stages(section: Parallelism, count: int, num_layers: int) -> ConfigIssue:
    degree, layers = section.pipeline_parallel_degree, section.pipeline_parallel_layers_per_stage
    problem = f"makes {count} stages, and the model has {num_layers} layers"
    if path := section.pipeline_parallel_schedule_csv:
        return ConfigIssue(CSV_KEY, problem, f"write one of at most {num_layers} stages", path)
    if layers is not None:
        return ConfigIssue(LAYERS_KEY, problem, "set it larger, or leave it unset", layers)
    problem = f"{section.pipeline_parallel_schedule} {problem}"
    fix = f"set it to at most {max(1, num_layers * degree // count)}"
    return ConfigIssue(DEGREE_KEY, problem, fix, degree)


def _is_block(name: str) -> bool:
    """Return whether a module is a block: blocks are numbered (`layers.3`)."""
    return name.rpartition(".")[2].isdigit()


def _balanced_stages(
    section: Parallelism, modules: Mapping[str, int], blocks: list[str], count: int
) -> list[list[str]]:
    if count > len(blocks):
        raise ConfigError(_too_many_stages(section, count, len(blocks)))
    names = list(modules)
    before = names[: names.index(blocks[0])]
    after = names[names.index(blocks[-1]) + 1 :]
    block = sum(modules[name] for name in blocks) / len(blocks)
    first = section.pipeline_parallel_first_stage_less_layers
    last = section.pipeline_parallel_last_stage_less_layers
    weights = [0.0] * count
    weights[0] += sum(modules[name] for name in before) / block if first is None else first
    weights[-1] += sum(modules[name] for name in after) / block if last is None else last
    sizes = _share_out(len(blocks), weights)
    for key, given, stage in ((FIRST_KEY, first, 0), (LAST_KEY, last, count - 1)):
        others = [sizes[n] + weights[n] for n in range(count) if n != stage]
        if given is not None and given >= max(others):
            problem = "leaves no layer for that stage, which needs at least one"
            fix = f"set it to at most {math.ceil(max(others)) - 1}, or leave it unset"
            raise ConfigError(ConfigIssue(key, problem, fix, given))
    ends = [sum(sizes[: stage + 1]) for stage in range(count)]
    stages = [blocks[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    stages[0] = before + stages[0]
    stages[-1] = stages[-1] + after
    return stages


def _share_out(num_layers: int, weights: Sequence[float]) -> list[int]:
    """Return the layers of each stage, at least one, on top of its weight.

    Each layer goes to the stage that is the lightest by then, which makes the heaviest as light as
    possible. Of equals the later one takes it: it holds fewer microbatches at a time.
    """
    sizes = [1] * len(weights)
    for _ in range(num_layers - len(sizes)):
        totals = [size + weight for size, weight in zip(sizes, weights, strict=True)]
        sizes[min(range(len(sizes)), key=lambda stage: (totals[stage], -stage))] += 1
    return sizes


def _split_stages(section: Parallelism, modules: Mapping[str, int]) -> list[list[str]]:
    """Return the stages that begin at the split points, and at the first module."""
    names, points = list(modules), list(section.pipeline_parallel_split_points)
    for point in points:
        if point not in names[1:]:
            fix = did_you_mean(point, names[1:])
            raise ConfigError(ConfigIssue(SPLIT_KEY, f'no stage can begin at "{point}"', fix))
    starts = [0, *map(names.index, points)]
    if starts != sorted(set(starts)):
        problem = "the modules are not in the order of the forward, each once"
        raise ConfigError(ConfigIssue(SPLIT_KEY, problem, f"order them as in {_some(names)}"))
    stages = [names[start:end] for start, end in zip(starts, [*starts[1:], len(names)])]
    _require_parameters(SPLIT_KEY, stages, modules)
    return stages


def _named_stages(section: Parallelism, modules: Mapping[str, int]) -> list[list[str]]:
    """Return the stages that the user lists.

    Raises `ConfigError` unless these are the model's modules in order.
    """
    names = list(modules)
    stages = [list(stage) for stage in section.module_fqns_per_model_part]
    listed = [name for stage in stages for name in stage]
    found = []
    for name in dict.fromkeys(listed):
        if name not in names:
            fix = did_you_mean(name, names)
            found.append(ConfigIssue(NAMES_KEY, f'the model has no module "{name}"', fix))
        elif listed.count(name) > 1:
            problem = f'"{name}" is in {listed.count(name)} places'
            found.append(ConfigIssue(NAMES_KEY, problem, "list it once"))
    if missing := [name for name in names if name not in listed]:
        fix = "put each module of the model in a stage"
        found.append(ConfigIssue(NAMES_KEY, f"leaves out {_some(missing)}", fix))
    if not found and listed != names:
        fix = f"list them as in {_some(names)}"
        found.append(ConfigIssue(NAMES_KEY, "modules are not in the order of the forward", fix))
    if found:
        raise ConfigError(found)
    _require_parameters(NAMES_KEY, stages, modules)
    return stages


def _require_parameters(key: str, stages: list[list[str]], modules: Mapping[str, int]) -> None:
    for number, stage in enumerate(stages):
        if not any(modules[name] for name in stage):
            problem = f"stage {number} has no parameters" + f": {_some(stage)}" * bool(stage)
            raise ConfigError(ConfigIssue(key, problem, "give every stage a module with some"))


def _some(names: Sequence[str]) -> str:
    shown = names if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)
