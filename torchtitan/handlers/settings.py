"""Settings of the built-in handlers, and their checks against the rest of the config. No torch.

They are apart from the handlers, whose modules import torch and torchao at the top.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import PathText
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Names, PositiveFloat, PositiveInt, Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.handlers.masks import CAUSAL, DOCUMENT, MASKS, WINDOW
from torchtitan.models.registry import model_args

Probability = Annotated[float, Field(ge=0, lt=1)]
FLOAT8_MULTIPLE, INT8_MULTIPLE, MXFP8_BLOCK = 16, 16, 32
AUTO_FILTER, EMULATED = "auto_filter_small_kn", "mxfp8_emulated"
_FLOAT8, _FLEX = "handlers.float8", "handlers.flex_attention"
_ALL_GATHER = f"{_FLOAT8}.enable_fsdp_float8_all_gather"
_PRECOMPUTE = f"{_FLOAT8}.precompute_float8_dynamic_scale_for_fsdp"
_SMALLEST_HEAD = 16
"""Channels: the smallest matrix product that Triton compiles for tensor cores."""


class CompileSettings(Section):
    """Settings of `compile`."""

    backend: Literal["inductor", "cudagraphs", "aot_eager", "eager"] = "inductor"
    """Compiler backend: `inductor` for speed; `eager` and `aot_eager` to find which stage fails."""


class FreezeSettings(Section):
    """Settings of `freeze`."""

    patterns: Names = Field(default=(), examples=[["tok_embeddings.*", "layers.0.*"]])
    """Globs over full parameter names: what matches one is frozen."""

    only: Names = Field(default=(), examples=[["output.*"]])
    """In place of `patterns`: what matches one of these globs is trained, all else is frozen."""

    @field_validator("only")
    @classmethod
    def _one_of_the_two(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        patterns = info.data.get("patterns")
        if patterns and value:
            raise ValueError("does not go with patterns. Fix: leave out one of the two")
        if patterns == () and not value:
            raise ValueError(
                "is empty, and patterns too, so nothing would be frozen. Fix: write patterns ="
                ' ["layers.0.*"], or only = ["output.*"], or leave the handler out'
            )
        return value


class LoraSettings(Section):
    """Settings of `lora`."""

    rank: PositiveInt = 8
    """Columns of B and rows of A, which add `scale * B A` to a matrix."""

    alpha: PositiveFloat = 16.0
    """The scale is `alpha / rank`."""

    rslora: bool = False
    """The scale is `alpha / sqrt(rank)`, which keeps updates alike for all ranks
    (https://arxiv.org/abs/2312.03732)."""

    dora: bool = False
    """Also train the length of each row of an adapted matrix (https://arxiv.org/abs/2402.09353)."""

    dropout: Probability = 0.0
    """Probability with which an adapter drops elements of its input; less than 1."""

    targets: Names = Field(default=(), examples=[["w[qv]"]])
    """Globs over full names of linears, or their last parts, such as `w[qv]`: these get adapters.
    Empty: all linears in the model's blocks."""

    adapter: PathText | None = Field(default=None, examples=["my_adapter"])
    """A folder of PEFT's with the adapters to start from, of the same rank, scale and targets.
    Unset: A is random and B zero. Without effect where a checkpoint has adapters: on a resume, and
    if `checkpoint.initial_load_path` is a step of adapters."""

    base_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """The type in which the frozen weights are held. Unset: `training.mixed_precision_param`, to
    which each step rounds them anyway, unless `training.dtype` is smaller."""


class QloraSettings(LoraSettings):
    """Settings of `qlora`, with those of `lora`."""

    bits: Literal[4, 8] = 4
    """4 for NF4, 8 for integers; 64 elements share a scale in either."""


class LinearSettings(Section):
    """Settings that all low-precision handlers share."""

    filter_fqns: Names = Field(default=(), examples=[["layers.0."]])
    """Linears whose full name contains one of these texts stay as they are. The head is never
    converted: it is computed with the loss, in `training.mixed_precision_param`."""


class Float8Settings(LinearSettings):
    """Settings of `float8`."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """Values that share a scale: a whole tensor (the fastest), or a row, with scales that are
    powers of two (more accurate); `rowwise_with_gw_hp` also computes the gradients of weights in
    high precision."""

    filter_fqns: Names = Field(default=(), examples=[["layers.0."]])
    """Linears whose full name contains one of these texts stay as they are;
    `auto_filter_small_kn` stands for those that torchao considers too small to gain."""

    enable_fsdp_float8_all_gather: bool = False
    """FSDP sends weights in float8, half the bytes; `tensorwise` only."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights after the optimizer step with one all-reduce, instead of
    one for each weight when it is gathered."""

    emulate: bool = False
    """Round to float8 but multiply in float32: for GPUs without float8. Slow."""


class Mxfp8Settings(LinearSettings):
    """Settings of `mxfp8`."""

    recipe_name: Literal["mxfp8_cublas", "mxfp8_emulated"] = "mxfp8_cublas"
    """`mxfp8_cublas` uses the tensor cores of Blackwell GPUs; `mxfp8_emulated` rounds to MXFP8 but
    multiplies in high precision, on any device. Slow."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel that rounds along columns, for the backward: Triton, CUDA or PyTorch. Always PyTorch
    when emulated."""


class Int8Settings(LinearSettings):
    """Settings of `int8`."""

    output: bool = True
    """Compute the output (input times weight) in int8."""

    grad_input: bool = True
    """Compute the gradient of the input (output gradient times weight) in int8."""

    grad_weight: bool = True
    """Compute the gradient of the weight (output gradient times input) in int8; the product in
    which rounding costs most."""


class BitNetSettings(LinearSettings):
    """Settings of `bitnet`."""


class FlexAttentionSettings(Section):
    """Settings of `flex_attention`."""

    masks: Names = Field(default=(), examples=[["causal", "sliding_window"]])
    """A token sees what all of these allow: `causal`, `document` (its own document, with
    `training.document_mask`), `sliding_window`, and what is registered. `causal` is always in
    force. Empty: what `training.document_mask` and the window ask for."""

    window: PositiveInt | None = Field(default=None, examples=[4096])
    """Tokens that `sliding_window` lets a token see, itself included. Unset: the model's
    `model.args.sliding_window`."""

    def chosen_window(self, model_window: int | None) -> int | None:
        """Return the handler's window, else the model's."""
        return model_window if self.window is None else self.window

    def chosen_masks(self, document_mask: bool, window: int | None) -> tuple[str, ...]:
        """Return the names of the masks in force. `window` is that of `chosen_window`."""
        implied = [DOCUMENT] * document_mask + [WINDOW] * (window is not None)
        return tuple(dict.fromkeys([CAUSAL, *(self.masks or implied)]))


def check_float8(context: RunContext, settings: Float8Settings) -> Iterator[ConfigIssue]:
    """Check the settings against each other, the mesh and the batch."""
    recipe = settings.recipe_name
    if not settings.emulate:
        yield from _no_float64(context, "float8")
        dtype = context.config.training.mixed_precision_param
        if context.device_type == "cuda" and recipe != "tensorwise" and dtype == "float32":
            problem = f"products with a scale for each row ({recipe}) come out in bfloat16"
            fix = f'set it to "bfloat16", or {_FLOAT8}.recipe_name to "tensorwise"'
            yield ConfigIssue("training.mixed_precision_param", problem, fix, dtype)
        if recipe != "rowwise_with_gw_hp":
            yield from _whole_blocks(context, "float8", FLOAT8_MULTIPLE)
    if settings.enable_fsdp_float8_all_gather:
        yield from _check_all_gather(context, settings)
    elif settings.precompute_float8_dynamic_scale_for_fsdp:
        problem = "it computes the scales of weights that FSDP sends in float8, and none are"
        fix = f"set {_ALL_GATHER} to true, or this to false"
        yield ConfigIssue(_PRECOMPUTE, problem, fix, value=True)
    if recipe == "rowwise_with_gw_hp" and AUTO_FILTER in settings.filter_fqns:
        problem = f"torchao has no figures for this recipe, by which {AUTO_FILTER} chooses"
        fix = f'leave "{AUTO_FILTER}" out, or choose another recipe'
        yield ConfigIssue(f"{_FLOAT8}.filter_fqns", problem, fix, value=AUTO_FILTER)


def _check_all_gather(context: RunContext, settings: Float8Settings) -> Iterator[ConfigIssue]:
    config = context.config
    if settings.recipe_name != "tensorwise":
        problem = f"FSDP sends one scale a weight, and {settings.recipe_name} has one for each row"
        fix = f'set {_FLOAT8}.recipe_name to "tensorwise", or this to false'
        yield ConfigIssue(_ALL_GATHER, problem, fix, value=True)
    on_host = config.training.enable_cpu_offload and context.device_type != "cpu"
    if on_host and settings.precompute_float8_dynamic_scale_for_fsdp:
        problem = (
            "weights in host memory (training.enable_cpu_offload) lose their scales on the way to"
            " the device, where FSDP computes them again"
        )
        yield ConfigIssue(_PRECOMPUTE, problem, "set it to false", value=True)
    shards = context.shard_degree * config.parallelism.context_parallel_degree
    if config.parallelism.data_parallel_replicate_degree > 1 and shards == 1:
        problem = "copies of the model without shards (DDP) gather no weights"
        fix = "set parallelism.data_parallel_shard_degree above 1 (HSDP), or this to false"
        yield ConfigIssue(_ALL_GATHER, problem, fix, value=True)


def check_mxfp8(context: RunContext, settings: Mxfp8Settings) -> Iterator[ConfigIssue]:
    """Check the settings against the device and the batch."""
    yield from _no_float64(context, "mxfp8")
    yield from _whole_blocks(context, "mxfp8", MXFP8_BLOCK)
    if settings.recipe_name != EMULATED and context.device_type == "cpu":
        problem = "MXFP8 needs the tensor cores of Blackwell GPUs, and this run is on CPUs"
        yield ConfigIssue("model.handlers", problem, _EMULATE_MXFP8, "mxfp8")


def check_int8(context: RunContext, settings: Int8Settings) -> Iterator[ConfigIssue]:
    """Check the settings against each other and the batch."""
    yield from _no_float64(context, "int8")
    if not (settings.output or settings.grad_input or settings.grad_weight):
        problem = "all of its products are switched off"
        fix = 'set handlers.int8.output to true, or take "int8" out'
        yield ConfigIssue("model.handlers", problem, fix, "int8")
    if settings.grad_weight:
        yield from _whole_blocks(context, "int8", INT8_MULTIPLE)


def check_bitnet(context: RunContext, settings: BitNetSettings) -> Iterator[ConfigIssue]:
    """Check the type of its products."""
    yield from _no_float64(context, "bitnet")


def check_flex_attention(
    context: RunContext, settings: FlexAttentionSettings
) -> Iterator[ConfigIssue]:
    """Check the settings against the device, the mesh, the model and each other."""
    if context.device_type != "cuda":
        problem = (
            "FlexAttention trains on CUDA only, because PyTorch has no backward of it for CPUs,"
            f" and this run is on {context.device_type}"
        )
        fix = (
            "leave it out: training.document_mask and model.args.sliding_window mask the same"
            " without it, on every device"
        )
        yield ConfigIssue("model.handlers", problem, fix, "flex_attention")
    yield from _no_float64(context, "flex_attention")
    mesh = context.config.parallelism
    if mesh.context_parallel_degree > 1 and mesh.context_parallel_method != "ulysses":
        problem = (
            f"with {mesh.context_parallel_method} no rank sees whole sequences, which the handler"
            " flex_attention needs"
        )
        fix = "set it to ulysses, or leave the handler out"
        key = "parallelism.context_parallel_method"
        yield ConfigIssue(key, problem, fix, mesh.context_parallel_method)
    args = model_args(context.config.model)
    if args is None:
        return
    heads = args.heads()
    if heads is not None and args.head_size() < _SMALLEST_HEAD:
        size = args.head_size()
        problem = f"its kernel needs heads of at least {_SMALLEST_HEAD} channels, not {size}"
        fix = "leave it out, or choose fewer heads"
        yield ConfigIssue("model.handlers", problem, fix, "flex_attention")
    unknown = list(_unknown_masks(settings))
    documents = context.config.training.document_mask
    yield from unknown or _check_masks(settings, documents, args.attention_window())


def _unknown_masks(settings: FlexAttentionSettings) -> Iterator[ConfigIssue]:
    key = f"{_FLEX}.masks"
    for place, name in enumerate(settings.masks):
        if name in settings.masks[:place]:
            yield ConfigIssue(key, "is listed twice", "list it once", name)
            continue
        try:
            if MASKS.get(name) is None:
                yield ConfigIssue(key, "is not a mask", fix_of_registered(name, MASKS), name)
        except ConfigError as error:
            yield from error.problems


def _check_masks(
    settings: FlexAttentionSettings, document_mask: bool, model_window: int | None
) -> Iterator[ConfigIssue]:
    """A list of masks replaces what other settings ask for, so it must not contradict them."""
    masks, window, key = settings.masks, settings.window, f"{_FLEX}.masks"
    if DOCUMENT in masks and not document_mask:
        problem = "it needs training.document_mask = true"
        yield ConfigIssue(key, problem, "set that to true, or leave it out here", DOCUMENT)
    if masks and document_mask and DOCUMENT not in masks:
        problem = f"training.document_mask = true asks for {DOCUMENT}, which is not listed"
        yield ConfigIssue(key, problem, "list it, or set that to false", list(masks))
    if window is not None and model_window is not None and window != model_window:
        problem = f"the model's own window is {model_window} (model.args.sliding_window)"
        yield ConfigIssue(f"{_FLEX}.window", problem, "remove one of the two", window)
    if WINDOW in masks and window is None and model_window is None:
        fix = f"set {_FLEX}.window, or model.args.sliding_window, which works on all devices"
        yield ConfigIssue(key, "the size of the window is not set", fix, WINDOW)
    if masks and WINDOW not in masks and (size := settings.chosen_window(model_window)) is not None:
        source = "model.args.sliding_window" if window is None else f"{_FLEX}.window"
        problem = f"{source} = {size} asks for {WINDOW}, which is not listed"
        yield ConfigIssue(key, problem, "list it, or remove that", list(masks))


_EMULATE_MXFP8 = (
    f'leave it out, or, to try it slowly, set handlers.mxfp8.recipe_name to "{EMULATED}"'
)


def check_float8_gpu(context: RunContext, settings: Float8Settings) -> Iterator[ConfigIssue]:
    """Check that the GPU computes float8."""
    if not settings.emulate:
        fix = f"leave it out, or, to try it slowly, set {_FLOAT8}.emulate to true"
        yield from _needs_capability(context, "float8", (8, 9), "Ada, Hopper", fix)


def check_mxfp8_gpu(context: RunContext, settings: Mxfp8Settings) -> Iterator[ConfigIssue]:
    """Check that the GPU computes MXFP8."""
    if settings.recipe_name != EMULATED:
        yield from _needs_capability(context, "mxfp8", (10, 0), "Blackwell", _EMULATE_MXFP8)


def check_flex_attention_gpu(
    context: RunContext, settings: FlexAttentionSettings
) -> Iterator[ConfigIssue]:
    """Check that the kernel can be compiled here."""
    yield from _needs_capability(context, "flex_attention", (7, 0), "Volta", "leave it out")
    if find_spec("triton") is None:
        problem, fix = "its kernels need Triton, which is not installed", "pip install triton"
        yield ConfigIssue("model.handlers", problem, f"{fix}, or leave it out", "flex_attention")


def _no_float64(context: RunContext, handler: str) -> Iterator[ConfigIssue]:
    dtype = context.config.training.mixed_precision_param
    if dtype == "float64":
        problem = f"the handler {handler} computes in types of at most 32 bits"
        yield ConfigIssue("training.mixed_precision_param", problem, 'set it to "bfloat16"', dtype)


def _whole_blocks(context: RunContext, handler: str, multiple: int) -> Iterator[ConfigIssue]:
    """Gradients of weights are products along the tokens of a microbatch."""
    training, mesh = context.config.training, context.config.parallelism
    size = training.local_batch_size
    if mesh.pipeline_parallel_degree > 1:
        size = mesh.pipeline_parallel_microbatch_size
    tokens = size * training.seq_len // mesh.context_parallel_degree
    if tokens % multiple:
        problem = (
            f"a rank's microbatch of {size} x {training.seq_len} tokens (context_parallel_degree ="
            f" {mesh.context_parallel_degree}) has {tokens}, and the kernels of the handler"
            f" {handler} need a multiple of {multiple}"
        )
        fix = f"set it to a multiple of {multiple * mesh.context_parallel_degree}"
        yield ConfigIssue("training.seq_len", problem, fix, training.seq_len)


def _needs_capability(
    context: RunContext, handler: str, least: tuple[int, int], device: str, fix: str
) -> Iterator[ConfigIssue]:
    """Imports torch. Only NVIDIA's numbers are compared."""
    import torch

    from torchtitan.utils.environment import EnvironmentFaults, read_environment

    if context.device_type != "cuda" or torch.version.hip is not None:
        return
    try:
        local_rank = read_environment().local_rank
    except EnvironmentFaults:
        return  # `--check` of another machine's world size
    if local_rank >= torch.cuda.device_count():
        return  # reported with the devices
    found = torch.cuda.get_device_capability(local_rank)
    if found < least:
        problem = (
            f"the GPU has compute capability {found[0]}.{found[1]}, and it needs"
            f" {least[0]}.{least[1]} ({device})"
        )
        yield ConfigIssue("model.handlers", problem, fix, handler)
