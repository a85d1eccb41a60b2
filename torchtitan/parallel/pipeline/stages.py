"""Which modules form which stage of a pipeline, and which rank holds which stage. No torch.

Stages are consecutive runs of the model's top-level modules. A balanced cut counts layers: each
block is one, the embedding and the head are as many as their parameters weigh, and the heaviest
stage becomes as light as possible, since the others wait for it. Several stages per rank shorten
the time in which ranks have nothing to do: either in loops (of 2 ranks the first holds stages 0 and
2), or folded in the shape of a V (stages 0 and 3), where the first rank also holds the end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Parallelism
from torchtitan.config.suggest import nearest
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
    """The stages of a pipeline, in the order of the forward."""

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
        """The stages of a rank, in order."""
        return [stage for stage, holder in enumerate(self.stage_to_rank) if holder == rank]

    def stages_with(self, name: str) -> list[int]:
        """Return the stages that hold a parameter of this full name: all, if in none's modules."""
        holding = [
            number
            for number, modules in enumerate(self.stages)
            if any(name == module or name.startswith(f"{module}.") for module in modules)
        ]
        return holding or list(range(len(self.stages)))

    def tied_modules(self, stage: int) -> list[str]:
        """Return the modules of other stages that hold a weight which `stage` shares."""
        names = [name for name, stages in self.tied.items() if stage in stages]
        modules = dict.fromkeys(map(self.module_of, names))
        return [module for module in modules if module not in self.stages[stage]]

    def module_of(self, name: str) -> str:
        """Return the module that a parameter of this full name is in; "" for none."""
        modules = (module for stage in self.stages for module in stage)
        return next((module for module in modules if name.startswith(f"{module}.")), "")


def plan_pipeline(context: RunContext, modules: Mapping[str, int]) -> PipelinePlan:
    """The cut of a model with these `modules` (`ModelArgs.modules`).

    Reads the schedule's file, if there is one. Raises `ConfigError` about keys, or a file, that fit
    neither the model nor each other.
    """
    section = context.config.parallelism
    degree = section.pipeline_parallel_degree
    blocks = [name for name in modules if _is_block(name)]
    if not blocks:
        problem = "this model cannot be cut into stages"
        raise ConfigError(ConfigIssue(DEGREE_KEY, problem, "set it to 1", degree))
    path = section.pipeline_parallel_schedule_csv
    if path:
        stage_to_rank = read_schedule(path, degree, context.pipeline_microbatches).stage_to_rank
    else:
        stage_to_rank = _holders(section, len(blocks))
    if section.module_fqns_per_model_part:
        stages = _named_stages(section, modules, len(stage_to_rank))
    elif section.pipeline_parallel_split_points:
        stages = _split_stages(section, modules, len(stage_to_rank))
    else:
        stages = _balanced_stages(section, modules, blocks, len(stage_to_rank))
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
    tied, torn = {}, []
    for name, stages in spread.items():
        module = plan.module_of(name)
        inside = [names[0] for names in names_of.values() if names[0].startswith(f"{module}.")]
        if module and len(stages) == 2 and all(spread.get(other) == stages for other in inside):
            tied[name] = (stages[0], stages[1])
        else:
            torn.append(name)
    if torn:
        names = next(names for names in names_of.values() if names[0] == torn[0])
        raise ConfigError(_torn(names, spread[torn[0]], len(torn) - 1, degree))
    return tied


def _torn(names: list[str], stages: list[int], num_more: int, degree: int) -> ConfigIssue:
    more = f" (and {num_more} more)" if num_more else ""
    copies = f"stages {_some([str(stage) for stage in stages])} would each train a copy"
    if len(names) == 1:
        problem = f"{names[0]}{more} is in no module of ModelArgs.modules(), so {copies}"
        fix = "set it to 1, or put the parameter into one of these modules"
    else:
        problem = f"{_some(names)} are one parameter{more}, and {copies}"
        fix = f"set it to 1, or keep what is shared in one stage ({NAMES_KEY})"
    return ConfigIssue(DEGREE_KEY, problem, fix, degree)


def number_of_stages(section: Parallelism, num_layers: int) -> int:
    """Stages of all ranks together, by the keys of the cut or else by the schedule.

    Layers per stage are counted as TorchTitan does, the embedding and the head for one layer each
    unless their keys say otherwise, so that its settings mean the same number here.
    """
    degree = section.pipeline_parallel_degree
    if section.module_fqns_per_model_part:
        return len(section.module_fqns_per_model_part)
    if section.pipeline_parallel_split_points:
        return len(section.pipeline_parallel_split_points) + 1
    if section.pipeline_parallel_layers_per_stage is not None:
        ends = (
            section.pipeline_parallel_first_stage_less_layers,
            section.pipeline_parallel_last_stage_less_layers,
        )
        counted = num_layers + sum(1 if end is None else end for end in ends)
        return math.ceil(counted / section.pipeline_parallel_layers_per_stage)
    return degree * (SCHEDULES[section.pipeline_parallel_schedule].stages_per_rank or 2)


def _holders(section: Parallelism, num_layers: int) -> tuple[int, ...]:
    """The rank of each stage; an error if the schedule cannot have so many stages."""
    degree, count = section.pipeline_parallel_degree, number_of_stages(section, num_layers)
    if not _fits(section, count):
        raise ConfigError(_wrong_number_of_stages(section, count, num_layers))
    if count > num_layers and not _is_cut_by_hand(section):
        # Before anything of that length is made: a degree may be a slip of the keyboard.
        raise ConfigError(_too_many_stages(section, count, num_layers))
    if SCHEDULES[section.pipeline_parallel_schedule].is_v:
        return (*range(degree), *reversed(range(degree)))
    return tuple(stage % degree for stage in range(count))


def _fits(section: Parallelism, count: int) -> bool:
    """Whether the schedule can have so many stages: on every rank the same right number."""
    per_rank, rest = divmod(count, section.pipeline_parallel_degree)
    exactly = SCHEDULES[section.pipeline_parallel_schedule].stages_per_rank
    return rest == 0 and (per_rank == exactly if exactly else per_rank >= 2)


def _wrong_number_of_stages(section: Parallelism, count: int, num_layers: int) -> ConfigIssue:
    degree, schedule = section.pipeline_parallel_degree, section.pipeline_parallel_schedule
    exactly = SCHEDULES[schedule].stages_per_rank
    wanted = f"{exactly * degree}" if exactly else f"{2 * degree}, {3 * degree} or so on"
    problem = f"makes {count} stages, and {schedule} on {degree} pipeline ranks needs {wanted}"
    if section.module_fqns_per_model_part:
        fix = f"list the modules of {wanted} stages, or choose another schedule"
        return ConfigIssue(NAMES_KEY, problem, fix)
    if section.pipeline_parallel_split_points:
        points = exactly * degree - 1 if exactly else f"{wanted} less one"
        fix = f"name {points} modules at which a stage begins, or choose another schedule"
        return ConfigIssue(SPLIT_KEY, problem, fix)
    layers = section.pipeline_parallel_layers_per_stage
    fitting = []
    for number in range(1, num_layers + 1):
        other = section.model_copy(update={"pipeline_parallel_layers_per_stage": number})
        stages = number_of_stages(other, num_layers)
        if stages <= num_layers and _fits(section, stages):
            fitting.append(number)
    close = sorted(sorted(fitting, key=lambda number: abs(number - (layers or 0)))[:3])
    fix = f"set it to {' or '.join(map(str, close))}, or leave" if close else "leave"
    return ConfigIssue(LAYERS_KEY, problem, f"{fix} it unset for a balanced cut", layers)


def _too_many_stages(section: Parallelism, count: int, num_layers: int) -> ConfigIssue:
    degree, schedule = section.pipeline_parallel_degree, section.pipeline_parallel_schedule
    layers = section.pipeline_parallel_layers_per_stage
    if layers is not None:
        problem = f"makes {count} stages, and the model has {num_layers} layers"
        return ConfigIssue(LAYERS_KEY, problem, "set it larger, or leave it unset", layers)
    problem = f"{schedule} makes {count} stages of it, and the model has {num_layers} layers"
    if section.pipeline_parallel_schedule_csv:
        path = section.pipeline_parallel_schedule_csv
        problem = f"has {count} stages, and the model has {num_layers} layers"
        fix = f"write one of at most {num_layers} stages, or leave it empty to use a named one"
        return ConfigIssue(CSV_KEY, problem, fix, path)
    fix = f"set it to at most {max(1, num_layers * degree // count)}"
    if count > degree and num_layers >= degree:
        fix += f', or {SCHEDULE_KEY} to "1F1B", which makes one stage a rank'
    return ConfigIssue(DEGREE_KEY, problem, fix, degree)


def _is_cut_by_hand(section: Parallelism) -> bool:
    return bool(section.module_fqns_per_model_part or section.pipeline_parallel_split_points)


def _is_block(name: str) -> bool:
    """Blocks are numbered (`layers.3`); what is not stands at the ends."""
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
    first, last = (getattr(section, key.rpartition(".")[2]) for key in (FIRST_KEY, LAST_KEY))
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
    """Layers of each stage, at least one, beside what it weighs already.

    Giving each layer to the stage that is the lightest by then makes the heaviest as light as
    possible, and the rest as even. Of equals the later one takes it: it holds fewer microbatches
    at a time.
    """
    sizes = [1] * len(weights)
    for _ in range(num_layers - len(sizes)):
        totals = [size + weight for size, weight in zip(sizes, weights, strict=True)]
        sizes[min(range(len(sizes)), key=lambda stage: (totals[stage], -stage))] += 1
    return sizes


def _split_stages(section: Parallelism, modules: Mapping[str, int], count: int) -> list[list[str]]:
    """The stages that begin at the modules which the user names, and at the first one."""
    names = list(modules)
    points = list(section.pipeline_parallel_split_points)
    for point in points:
        if point not in names[1:]:
            problem = f'no stage can begin at "{point}"'
            match = nearest(point, names[1:])
            fix = f'did you mean "{match}"?' if match else f"choose from {_some(names[1:])}"
            raise ConfigError(ConfigIssue(SPLIT_KEY, problem, fix))
    starts = [0, *map(names.index, points)]
    if starts != sorted(set(starts)):
        problem = "its modules are not in the order of the forward, each once"
        raise ConfigError(
            ConfigIssue(SPLIT_KEY, problem, f"order them as in {_some(names)}", points)
        )
    if len(starts) != count:
        problem = f"makes {len(starts)} stages, and the schedule's file has {count}"
        raise ConfigError(ConfigIssue(SPLIT_KEY, problem, f"name {count - 1} modules", points))
    stages = [names[start:end] for start, end in zip(starts, [*starts[1:], len(names)])]
    if empty := _without_parameters(stages, modules):
        problem = f"{_some(empty[0])} has no parameters, and a stage needs some"
        raise ConfigError(
            ConfigIssue(SPLIT_KEY, problem, "leave out the module it begins at", points)
        )
    return stages


def _without_parameters(stages: list[list[str]], modules: Mapping[str, int]) -> list[list[str]]:
    return [stage for stage in stages if stage and not any(modules[name] for name in stage)]


def _named_stages(section: Parallelism, modules: Mapping[str, int], count: int) -> list[list[str]]:
    """The stages that the user lists; an error if they are not the model's modules in order."""
    names = list(modules)
    stages = [list(stage) for stage in section.module_fqns_per_model_part]
    listed = [name for stage in stages for name in stage]
    problems = []
    for name in dict.fromkeys(listed):
        if name not in names:
            problem = f'"{name}" is no module of the model'
            match = nearest(name, names)
            fix = f'did you mean "{match}"?' if match else f"the modules are {_some(names)}"
            problems.append(ConfigIssue(NAMES_KEY, problem, fix))
        elif listed.count(name) > 1:
            problem = f'"{name}" is in {listed.count(name)} places'
            problems.append(ConfigIssue(NAMES_KEY, problem, "leave it in one"))
    missing = [name for name in names if name not in listed]
    if missing:
        problem = f"leaves out {_some(missing)}"
        problems.append(ConfigIssue(NAMES_KEY, problem, "put each module of the model in a stage"))
    if not all(stages):
        problem = f"stage {stages.index([])} has no module"
        problems.append(ConfigIssue(NAMES_KEY, problem, "give every stage at least one"))
    for stage in [] if problems else _without_parameters(stages, modules):
        problem = f"{_some(stage)} has no parameters, and a stage needs some"
        problems.append(ConfigIssue(NAMES_KEY, problem, "put it into a stage beside it"))
    if not problems and listed != names:
        early = next(name for name, right in zip(listed, names, strict=True) if name != right)
        problem = f'"{early}" stands too early'
        fix = f"list the modules in the order of the forward: {_some(names)}"
        problems.append(ConfigIssue(NAMES_KEY, problem, fix))
    if len(stages) != count:
        problem = f"lists {len(stages)} stages, and the schedule's file has {count}"
        problems.append(ConfigIssue(NAMES_KEY, problem, f"list the modules of {count} stages"))
    if problems:
        raise ConfigError(problems)
    return stages


def _some(names: Sequence[str]) -> str:
    shown = names if len(names) <= 4 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)
