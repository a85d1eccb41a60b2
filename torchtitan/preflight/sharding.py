"""Checks that a model can be cut over ranks as its family and its handlers leave it."""

import logging
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.preflight.pipeline_parallel import plan
from torchtitan.preflight.tensor_parallel import DEGREE_KEY

if TYPE_CHECKING:
    from torch import nn


def check_model(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    """Return what keeps FSDP, a pipeline or tensor parallelism from cutting the model.

    Converts `model`, which is on the meta device, as a start does. For configs that are sound
    otherwise.
    """
    from torchtitan.handlers.named import HandlerError

    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # handlers log what they do when the model is built in earnest
    try:
        return _problems(context, model)
    except ConfigError as error:
        return error.problems
    except HandlerError as error:
        problem = f"whether the model can be cut is not checked: {error}"
        fix = "correct the handler, unless its hook needs the processes of a run"
        return [warning("model.handlers", problem, fix)]
    finally:
        logging.disable(before)


def _problems(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.handlers.conversion import convert_model
    from torchtitan.handlers.named import NamedHandler
    from torchtitan.models.family import require_language_model
    from torchtitan.parallel.pipeline.stages import find_tied_weights
    from torchtitan.parallel.tensor_parallel import extended_plan
    from torchtitan.parallel.tensor_plan_checks import plan_problems
    from torchtitan.utils.dtypes import torch_dtype

    config = context.config
    dims = ParallelDims.from_section(config.parallelism, context.world_size)
    args = model_args(config.model)
    if args is None or (dims.tp > 1 and args.tensor_parallel_problems(dims.tp)):
        return []  # reported by the checks of these sections
    pipeline = plan(context, args) if dims.pp > 1 else None
    handlers = [NamedHandler(name, config, dims) for name in config.model.handlers]
    require_language_model(model, config.model.name)
    convert_model(model, handlers, torch_dtype(config.training.dtype))
    key = "model.handlers" if handlers else "model.name"
    issues = [*_scalars(model, key), *_odd_types(model, key)]
    if pipeline is not None:
        try:
            find_tied_weights(pipeline, model, dims.pp)
        except ConfigError as error:
            issues += error.problems
    if dims.tp > 1:
        tp_plan = extended_plan(model, dims.tp, [handler.extend_tp_plan for handler in handlers])
        fix = "correct tensor_parallel_plan (extend_tp_plan of a handler), or set it to 1"
        texts = plan_problems(model, tp_plan)
        issues += [ConfigIssue(DEGREE_KEY, text, fix, dims.tp) for text in texts]
    return issues


def _scalars(model: "nn.Module", key: str) -> list[ConfigIssue]:
    """FSDP, which also a single process uses, shards along a dimension."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if not names:
        return []
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    problem = f"a parameter needs a dimension to be sharded along, and {shown} has none"
    return [ConfigIssue(key, problem, "make it a tensor of the shape [1]")]


def _odd_types(model: "nn.Module", key: str) -> list[ConfigIssue]:
    """FSDP gathers parameters that are trained in one buffer."""
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names.setdefault(str(parameter.dtype).removeprefix("torch."), []).append(name)
    if len(names) < 2:
        return []
    usual = max(names, key=lambda dtype: len(names[dtype]))
    odd = next(dtype for dtype in names if dtype != usual)
    problem = f"{names[odd][0]} is {odd}, and what is trained has to have one type, here {usual}"
    return [ConfigIssue(key, problem, "make it without a type: it has that of training.dtype then")]
