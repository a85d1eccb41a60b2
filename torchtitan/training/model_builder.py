"""Build the model: meta device, handlers, stages, parallelism, memory, initial weights.

The order matters, so every model of this library, trained or evaluated, is built here.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import InitRules, convert_model
from torchtitan.handlers.named import NamedHandler
from torchtitan.models.family import require_language_model
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.parallel.initialize import initialize_tensors
from torchtitan.parallel.parallelize import parallelize
from torchtitan.parallel.pipeline.stages import PipelinePlan, find_tied_weights, plan_pipeline
from torchtitan.parallel.pipeline.tied_weights import TiedWeight, build_stage, tied_weights_of
from torchtitan.utils.dtypes import default_dtype, torch_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltModel:
    """A model, ready to run on this rank."""

    args: ModelArgs
    """The hyper-parameters, resolved."""
    parts: list[nn.Module]
    """The modules on this rank: the model, or its pipeline stages."""
    plan: PipelinePlan | None
    """The pipeline stages; None without a pipeline."""
    handlers: list[NamedHandler]
    parameter_names: tuple[str, ...]
    """Names of the whole model, including the parameters of other ranks."""
    num_parameters: int
    """Elements of the whole model, before handlers change it."""
    num_with_added: int
    """The same after handlers, with what they add; of quantised matrices those of the matrix."""
    num_trained: int
    """Elements of the whole model that are trained."""
    flops_per_token: float
    """TorchTitan's formula, which counts attention to all positions."""
    flops_per_token_causal: float
    """The same, counting attention to earlier positions only."""
    tied: tuple[TiedWeight, ...] = ()
    """This rank's copies of weights that two stages of a pipeline share."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank."""
        return [parameter for part in self.parts for parameter in part.parameters()]

    @property
    def uncounted(self) -> list[nn.Parameter]:
        """The parameters that the gradient norm leaves out, since another stage counts a copy."""
        return [parameter for weight in self.tied for parameter in weight.uncounted]

    @property
    def part_or_parts(self) -> nn.Module | list[nn.Module]:
        """The argument of handlers' hooks: the model, or the list of its stages on this rank."""
        return self.parts[0] if len(self.parts) == 1 else self.parts


def build_model(
    config: JobConfig,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    device: torch.device,
    initialise: bool = True,
) -> BuiltModel:
    """Build the model on `device`, parallelised over `mesh`, with its initial weights.

    `vocab_size` is the tokenizer's. Without `initialise`, weights that no handler added are left
    uninitialised, for a caller that loads them next. All ranks must call it.
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
    if config.model.print_after_conversion:
        logger.info("The model after its handlers:\n%s", model)
    plan, parts = None, [model]
    if dims.pp > 1:
        plan = plan_pipeline(config.parallelism, args.modules())
        plan = replace(plan, tied=find_tied_weights(plan, model, dims.pp))
        parts = [
            build_stage(model, plan, stage) for stage in plan.held_by(mesh.get_local_rank("pp"))
        ]
    built = BuiltModel(
        args=args,
        parts=parts,
        plan=plan,
        handlers=handlers,
        parameter_names=tuple(name for name, _ in model.named_parameters()),
        num_parameters=num_parameters,
        num_with_added=num_elements(model.parameters()),
        num_trained=num_elements(p for p in model.parameters() if p.requires_grad),
        flops_per_token=model.flops_per_token(seq_len, causal=False),
        flops_per_token_causal=model.flops_per_token(seq_len, causal=True),
    )
    for part in built.parts:
        parallelize(part, config, mesh, dims, [handler.extend_tp_plan for handler in handlers])
        _allocate(part, device, parameters_on_host=config.training.enable_cpu_offload)
        _initialize(part, rules, config.debug.seed, with_own=initialise)
    if plan is None:
        return built
    return replace(built, tied=tied_weights_of(plan, mesh.get_local_rank("pp"), parts))


def num_elements(parameters: Iterable[Tensor]) -> int:
    """Count elements; those of a quantised matrix are the matrix's, however they are stored."""
    return sum(getattr(parameter, "num_weights", parameter.numel()) for parameter in parameters)


def initialize_added(model: BuiltModel, without: Collection[NamedHandler] = ()) -> None:
    """Call `initialize_added` of the handlers but those whose added tensors were loaded."""
    for handler in model.handlers:
        if handler not in without:
            handler.initialize_added(model.part_or_parts)


def call_after_load(model: BuiltModel) -> None:
    """Call the handlers' `after_load`: the weights are initialised or loaded."""
    for handler in model.handlers:
        handler.after_load(model.part_or_parts)


def build_handlers(config: JobConfig, dims: ParallelDims) -> list[NamedHandler]:
    """Build the handlers of `model.handlers`, in order."""
    return [NamedHandler(name, config, dims) for name in config.model.handlers]


def _allocate(part: nn.Module, device: torch.device, parameters_on_host: bool) -> None:
    """Allocate what is on the meta device.

    FSDP moves parameters from the host to the device when it needs them; buffers must be there.
    """
    part.to_empty(device=torch.device("cpu") if parameters_on_host else device)
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                setattr(module, name, torch.empty_like(buffer, device=device))


def _initialize(model: nn.Module, rules: InitRules, seed: int, with_own: bool) -> None:
    """Initialise buffers, what handlers add, and, if `with_own`, the family's parameters.

    Weights that are loaded later may lack what handlers add.
    """
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
