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

    def module_of(self, name: str) -> str:
        """Return the module that a parameter of this full name is in; "" for none."""
        modules = (module for stage in self.stages for module in stage)
        return next((module for module in modules if f"{name}.".startswith(f"{module}.")), "")


def plan_pipeline(section: Parallelism, modules: Mapping[str, int]) -> PipelinePlan:
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
        stage_to_rank, _ = read_schedule(path, degree)
    else:
        stage_to_rank = _stage_to_rank(section, len(blocks))
    if section.module_fqns_per_model_part:
        stages = _named_stages(section, modules)
    elif section.pipeline_parallel_split_points:
        stages = _split_stages(section, modules)
    else:
        stages = _balanced_stages(section, modules, blocks, len(stage_to_rank))
    key, count = _split_key(section), len(stage_to_rank)
    if len(stages) != count:
        problem = f"makes {len(stages)} stages, and the schedule's file has {count}"
        raise ConfigError(ConfigIssue(key, problem, f"make {count} stages"))
    for number, stage in enumerate(stages):
        if not any(modules[name] for name in stage):
            problem = f"stage {number} has no parameters" + f": {_some(stage)}" * bool(stage)
            raise ConfigError(ConfigIssue(key, problem, "give every stage a module with some"))
    return PipelinePlan(tuple(map(tuple, stages)), stage_to_rank)


def find_tied_weights(
    plan: PipelinePlan, model: "nn.Module", degree: int
) -> dict[str, tuple[int, int]]:
    """Return the weights that two stages share, by their first name, with these stages.

    `model` is whole. Raises `ConfigError` for parameters that several stages would each train a
    copy of: a second stage can keep a copy of a module such as the embedding, of which it shares
    every parameter, and not of a whole block.
    """
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name in by_name:
        if not plan.module_of(name):
            problem = f"{name} is in no module of ModelArgs.modules(), so each stage would train it"
            fix = "set it to 1, or put the parameter into one of these modules"
            raise ConfigError(ConfigIssue(DEGREE_KEY, problem, fix, degree))
    held = [
        {parameter for name in stage for parameter in model.get_submodule(name).parameters()}
        for stage in plan.stages
    ]
    tied = {}
    for name, shared in model.named_parameters():
        stages = [number for number, parameters in enumerate(held) if shared in parameters]
        if len(stages) > 1:
            module = set(model.get_submodule(plan.module_of(name)).parameters())
            if len(stages) > 2 or not all(module <= held[stage] for stage in stages):
                names = _some([other for other in by_name if by_name[other] is shared])
                copies = f"stages {_some(list(map(str, stages)))} would each train a copy"
                problem = f"{names} are one parameter, and {copies}"
                fix = f"set it to 1, or keep what is shared in one stage ({NAMES_KEY})"
                raise ConfigError(ConfigIssue(DEGREE_KEY, problem, fix, degree))
            tied[name] = (stages[0], stages[1])
    return tied


def _number_of_stages(section: Parallelism, num_layers: int) -> int:
    """Return the stages of all ranks together, by the keys of the split or by the schedule.

    Layers per stage are counted as TorchTitan does: the embedding and the head are one layer each
    unless their keys say otherwise.
    """
    if named := section.module_fqns_per_model_part:
        return len(named)
    if points := section.pipeline_parallel_split_points:
        return len(points) + 1
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
    degree, count = section.pipeline_parallel_degree, _number_of_stages(section, num_layers)
    name, key = section.pipeline_parallel_schedule, _split_key(section)
    schedule = SCHEDULES[name]
    per_rank, left_over = divmod(count, degree)
    exactly = schedule.stages_per_rank
    if left_over or (per_rank < 2 and exactly is None) or exactly not in (None, per_rank):
        wanted = f"{exactly * degree}" if exactly else f"{2 * degree}, {3 * degree} or so on"
        problem = f"makes {count} stages, and {name} on {degree} pipeline ranks needs {wanted}"
        fix = "leave it unset for a balanced split, or choose another schedule"
        raise ConfigError(ConfigIssue(key, problem, fix))
    if count > num_layers and key == LAYERS_KEY:
        # Before anything of that length is made: the degree may be a typing error.
        raise ConfigError(_too_many_stages(section, count, num_layers))
    if schedule.is_v:
        return (*range(degree), *reversed(range(degree)))
    return tuple(stage % degree for stage in range(count))


def _split_key(section: Parallelism) -> str:
    """Return the key that decides the split."""
    if section.module_fqns_per_model_part:
        return NAMES_KEY
    return SPLIT_KEY if section.pipeline_parallel_split_points else LAYERS_KEY


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
    for end, given, stage in (("first", first, 0), ("last", last, count - 1)):
        others = [sizes[n] + weights[n] for n in range(count) if n != stage]
        if given is not None and given >= max(others):
            problem = "leaves no layer for that stage, which needs at least one"
            fix = f"set it to at most {math.ceil(max(others)) - 1}, or leave it unset"
            key = f"parallelism.pipeline_parallel_{end}_stage_less_layers"
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
    return [names[start:end] for start, end in zip(starts, [*starts[1:], len(names)])]


def _named_stages(section: Parallelism, modules: Mapping[str, int]) -> list[list[str]]:
    """Return the listed stages; raise `ConfigError` unless they are the modules in order."""
    names = list(modules)
    stages = [list(stage) for stage in section.module_fqns_per_model_part]
    listed = [name for stage in stages for name in stage]
    unknown = [
        ConfigIssue(NAMES_KEY, f'the model has no module "{name}"', did_you_mean(name, names))
        for name in listed
        if name not in modules
    ]
    if unknown:
        raise ConfigError(unknown)
    if listed != names:
        missing = [name for name in names if name not in listed]
        problem = "the modules are not in the order of the forward, each once"
        problem = f"leaves out {_some(missing)}" if missing else problem
        raise ConfigError(ConfigIssue(NAMES_KEY, problem, f"list them as in {_some(names)}"))
    return stages


def _some(names: Sequence[str]) -> str:
    shown = names if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)
