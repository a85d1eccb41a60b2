"""Descriptions of a run: the line at its start, and the texts that TensorBoard shows."""

import logging
from collections.abc import Sequence

import torch

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.toml_text import dump_toml
from torchtitan.data.loader import Loader
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.metrics.tensorboard import as_code
from torchtitan.parallel.compile import is_marked_for_compile
from torchtitan.training.model_builder import BuiltModel
from torchtitan.utils.device import memory_peak
from torchtitan.utils.text import format_bytes, plural
from torchtitan.utils.torch_compat import local_tensor

logger = logging.getLogger(__name__)

_SAMPLE_CHARACTERS = 10_000


def describe_run(
    context: RunContext,
    dims: ParallelDims,
    world: DistributedContext,
    model: BuiltModel,
    data: str,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> str:
    """Describe the run in a line for the log. `data`: its name and amount."""
    config = context.config
    training = config.training
    trained = ""
    if model.num_trained < model.num_with_added:
        trained = f", {model.num_trained / 1e6:,.1f} M of them trained"
    handlers = f" with {', '.join(config.model.handlers)}" * bool(config.model.handlers)
    ranks = f"{world.world_size} ranks of " * (world.world_size > 1)
    pipeline = ""
    if model.plan is not None:
        layers = ", ".join(map(str, model.plan.layers))
        pipeline = f"; stages of {layers} layers"
    compiled = any(
        is_marked_for_compile(block) for part in model.parts for block in part.blocks().values()
    )
    compiling = "; the first step compiles, which may take minutes" if compiled else ""
    return (
        f"Training {config.model.name} {config.model.flavor}"
        f" ({model.num_with_added / 1e6:,.1f} M parameters{trained}){handlers}"
        f" on {ranks}{world.device.type} ({dims.describe()}),"
        f" {training.mixed_precision_param} compute; {plural(training.steps, 'step')}:"
        f" {context.describe_batch()}; data {data}, {plural(context.num_lanes, 'lane')}"
        f"{_describe_memory(config, model, optimizers, world.device)}{pipeline}{compiling}"
    )


def _describe_memory(
    config: JobConfig,
    model: BuiltModel,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> str:
    """Describe the memory of the device that is taken between steps, as far as it is known.

    A frozen model and what a handler keeps are not counted, nor are activations.
    """
    if config.training.enable_cpu_offload:
        return ""
    held, missing = list(model.parameters), ["activations"]
    if not config.optimizer.early_step_in_backward:  # which frees each gradient at once
        held += [parameter for parameter in model.parameters if parameter.requires_grad]
    # Made already where a checkpoint may be loaded into it.
    values = (value for each in optimizers for of in each.state.values() for value in of.values())
    if state := [value for value in values if isinstance(value, torch.Tensor)]:
        held += state
    else:
        missing.append("optimizer state")
    size = format_bytes(sum(local_tensor(tensor).nbytes for tensor in held))
    of = f" of {memory_peak(device).capacity_gib:.0f} GiB" if device.type == "cuda" else ""
    return f"; memory {size}{of} a rank before {' and '.join(missing)}"


def texts_of_run(config: JobConfig, loader: Loader, is_fresh: bool) -> dict[str, str]:
    """Return Markdown for TensorBoard: the settings without secrets, and for a fresh run a sample.

    The sample is the first sequence that this rank has read. It stays in the run folder.
    """
    texts = {"config": as_code(dump_toml(config, redacted=True))}
    if is_fresh:
        try:
            text = loader.sample_text(_SAMPLE_CHARACTERS)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a user's own tokenizer; a panic in Rust's is no Exception
            logger.warning("TensorBoard gets no sample of the data: %r", error)
        else:
            texts["data_sample"] = as_code(text[:_SAMPLE_CHARACTERS])
    return texts
