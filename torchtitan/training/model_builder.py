"""Build the model: meta device, handlers, stages, parallelism, memory, initial weights.

The one subtle order of a start lives here, so that a model that is evaluated is built exactly as
one that is trained.
"""

import logging
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import InitRules, convert_model
from torchtitan.handlers.named import NamedHandler
from torchtitan.models.registry import get_family
from torchtitan.models.spec import LanguageModel, ModelArgs, require_language_model
from torchtitan.parallel.initialize import initialize_tensors
from torchtitan.parallel.parallelize import parallelize
from torchtitan.parallel.pipeline.stages import PipelinePlan, plan_pipeline, torn_parameters
from torchtitan.utils.dtypes import default_dtype, torch_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltModel:
    """A model, ready to run on this rank."""

    args: ModelArgs
    """The hyper-parameters, resolved."""
    parts: list[nn.Module]
    """What this rank holds of the model; one part, where it is not cut into stages."""
    plan: PipelinePlan | None
    """How the model is cut into stages, of which this rank holds the `parts`."""
    handlers: list[NamedHandler]
    parameter_names: tuple[str, ...]
    """Of the whole model, also of what other ranks hold."""
    num_parameters: int
    """Of the whole model, before handlers changed it."""
    flops_per_token: float
    """By TorchTitan's formula, which counts attention to all positions."""
    flops_per_token_causal: float
    """The same, counting attention to earlier positions only."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this rank."""
        return [parameter for part in self.parts for parameter in part.parameters()]

    @property
    def part_or_parts(self) -> nn.Module | list[nn.Module]:
        """The argument of handlers' hooks: the model, or its parts where it is cut into stages."""
        return self.parts[0] if len(self.parts) == 1 else self.parts


def build_model(
    config: JobConfig,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    device: torch.device,
    initialise: bool = True,
) -> BuiltModel:
    """The model on `device`, parallelised over `mesh`, with its initial weights.

    `vocab_size` is the tokenizer's. Without `initialise` the weights, but for those that handlers
    add, are whatever was in memory, for a caller who loads them next. All ranks must call it.
    """
    family = get_family(config.model.name)
    args = family.resolve(config.model, vocab_size)
    dtype = torch_dtype(config.training.dtype)
    with torch.device("meta"), default_dtype(dtype):
        model = family.build(args)
    require_language_model(model, family.name)
    seq_len = config.training.seq_len
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    handlers = build_handlers(config, dims)
    rules = convert_model(model, handlers, dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problem = "nothing is left to train after them"
        raise ConfigError(
            ConfigIssue("model.handlers", problem, "freeze less", config.model.handlers)
        )
    if config.model.print_after_conversion:
        logger.info("The model after its handlers:\n%s", model)
    plan, parts = None, [model]
    if dims.pp > 1:
        plan = plan_pipeline(RunContext(config, dims.world_size, device.type), args.modules())
        if torn := torn_parameters(plan, model, dims.pp):
            raise ConfigError(torn)
        stages = plan.held_by(mesh.get_local_rank("pp"))
        parts = [_cut_out(model, plan.stages[stage]) for stage in stages]
    built = BuiltModel(
        args=args,
        parts=parts,
        plan=plan,
        handlers=handlers,
        parameter_names=tuple(name for name, _ in model.named_parameters()),
        num_parameters=num_parameters,
        flops_per_token=model.flops_per_token(seq_len, causal=False),
        flops_per_token_causal=model.flops_per_token(seq_len, causal=True),
    )
    for part in built.parts:
        parallelize(part, config, mesh, dims, [handler.extend_tp_plan for handler in handlers])
        _allocate(part, device, parameters_on_host=config.training.enable_cpu_offload)
        _initialize(part, rules, config.debug.seed, with_own=initialise)
    return built


def call_after_load(model: BuiltModel) -> None:
    """Tell the handlers that want to know that the weights are there, initial or loaded ones."""
    for handler in model.handlers:
        handler.after_load(model.part_or_parts)


def build_handlers(config: JobConfig, dims: ParallelDims) -> list[NamedHandler]:
    """The handlers of `model.handlers`, in that order."""
    return [NamedHandler(name, config, dims) for name in config.model.handlers]


def _cut_out(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy of `model` (on the meta device) with these top-level modules only."""
    stage = deepcopy(model)
    assert isinstance(stage, LanguageModel)
    stage.keep_modules(names)
    return stage


def _allocate(part: nn.Module, device: torch.device, parameters_on_host: bool) -> None:
    """Memory for what is on the meta device. FSDP moves parameters that are on the host to the
    device when they are needed, but buffers have to be there."""
    part.to_empty(device=torch.device("cpu") if parameters_on_host else device)
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, torch.empty_like(buffer, device=device))


def _initialize(model: nn.Module, rules: InitRules, seed: int, with_own: bool) -> None:
    """Fill the family's own parameters if `with_own`; what handlers add in any case, since the
    weights that a run starts from may lack it; and the buffers, which come out of allocation with
    arbitrary content."""
    names = [name for name, _ in model.named_buffers() if name not in rules.added]
    if names and not hasattr(model, "init_buffers"):
        raise ValueError(f"the model has buffers ({', '.join(names[:3])}) but no init_buffers()")
    if names:
        model.init_buffers()  # type: ignore[operator]
    tensors = [
        (name, tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name in rules.added or (with_own and isinstance(tensor, nn.Parameter))
    ]
    if with_own or not any(tensor.is_meta for _, tensor in tensors):  # a dry run has no values
        initialize_tensors(tensors, rules, seed)
