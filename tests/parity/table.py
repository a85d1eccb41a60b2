"""The meshes that are proven equal to one process.

Each row trains the same tiny model on the same data (`tests/distributed/tiny.py`) on another mesh.
The variants of the model (tied, packed documents) and what is special (schedule, method) are spread
over the meshes, so that each meets many others. A row's name is made from its config.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed.tiny import Case
from tests.parity.adapted import ADAPTED, kept_handlers, kind_of
from tests.parity.frozen_models import FROZEN_MODELS, in_each_step, words_of
from tests.parity.long_context import LONG_CONTEXT
from tests.parity.own_models import OWN_MODELS, reference_microbatches
from tests.parity.tied_pipelines import TIED_PIPELINES
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.registry import loss_settings

TOLERANCE = 1e-11
"""Bound of every relative difference: 1e-12 and less occurs; a mistake shows at 1e-2 and more."""

FULL = {"activation_checkpoint": {"mode": "full"}}
EVERY_SECOND = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
COMPILED, INDUCTOR = (
    {"model": {"handlers": ["compile"]}, "handlers": {"compile": {"backend": backend}}}
    for backend in ("aot_eager", "inductor")
)
BY_BUDGET = {"activation_checkpoint": {"mode": "memory_budget", "memory_budget": 0.5}}
PARAMETERS_ON_HOST = {"training": {"enable_cpu_offload": True}}
ACTIVATIONS_ON_HOST = {"activation_checkpoint": {"offload": True}}
REGULARISED = {"loss": {"args": {"z_loss_weight": 0.01, "label_smoothing": 0.1}}}


def parallelism(**values: Any) -> dict[str, dict[str, Any]]:
    """Settings of the section `[parallelism]`."""
    return {"parallelism": values}


ALLGATHER = parallelism(context_parallel_method="allgather")
RING = parallelism(context_parallel_method="ring")
ULYSSES = parallelism(context_parallel_method="ulysses", context_parallel_load_balancer="none")
ALLGATHER_IN_ORDER, RING_IN_ORDER = (
    parallelism(context_parallel_method=method, context_parallel_load_balancer="none")
    for method in ("allgather", "ring")
)
PAIRS = parallelism(pipeline_parallel_microbatch_size=2)
FROM_FILE = parallelism(
    pipeline_parallel_schedule_csv=str(Path(__file__).with_name("two_ranks.csv"))
)
BY_NAME = parallelism(
    module_fqns_per_model_part=[
        ["tok_embeddings", "layers.0", "layers.1", "layers.2"],
        ["layers.3", "norm", "output"],
    ]
)
ENDS_APART = parallelism(
    module_fqns_per_model_part=[["tok_embeddings"], ["layers.0", "layers.1"], ["norm"], ["output"]]
)
BY_LAYERS = parallelism(
    pipeline_parallel_layers_per_stage=2,
    pipeline_parallel_first_stage_less_layers=1,
    pipeline_parallel_last_stage_less_layers=1,
)


def row(
    *settings: dict[str, dict[str, Any]],
    replicate: int = 1,
    shard: int = 1,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    **model: Any,
) -> Case:
    """A mesh, what is special about it (sections of the config), variants of the model."""
    sections: dict[str, dict[str, Any]] = {}
    for part in settings:
        for name, values in part.items():
            sections[name] = {**sections.get(name, {}), **values}
    handlers = [name for part in settings for name in part.get("model", {}).get("handlers", [])]
    if handlers:
        sections["model"]["handlers"] = handlers
    world_size = replicate * shard * cp * tp * pp
    return Case(world_size, replicate, shard, cp, tp, pp, settings=sections, **model)


MUON = {"optimizer": {"name": "Muon"}}
MUON_BY_NAME = {
    "optimizer": {
        "name": "Muon",
        "args": {"patterns": ["layers.*.w?.weight"], "nesterov": False, "adjust_lr_fn": "original"},
    }
}
ADAFACTOR = {"optimizer": {"name": "Adafactor"}}
SGD = {"optimizer": {"name": "SGD", "args": {"momentum": 0.9, "nesterov": True}}}
BF16_STATE = {"optimizer": {"name": "AdamWBF16"}}
EIGHT_BITS = {"optimizer": {"name": "AdamW8bit", "args": {"block_size": 16}}}

FREEZES: dict[str, dict[str, list[str]]] = {
    "embedding and first layer": {"patterns": ["tok_embeddings.*", "layers.0.*"]},
    "attention": {"patterns": ["*.attention.*"]},
    "all but feed-forwards and head": {"only": ["*.feed_forward.*", "output.*"]},
    "all but the head": {"only": ["output.*"]},
}
"""What is frozen, by a name of few words."""
FROZEN_START, FROZEN_ATTENTION, FEED_FORWARDS, HEAD_ALONE = (
    {"model": {"handlers": ["freeze"]}, "handlers": {"freeze": settings}}
    for settings in FREEZES.values()
)

TIED = {"tied": True}
PACKED = {"document_mask": True}
BOTH = {**TIED, **PACKED}

ONE = [
    row(microbatches=4),
    row(microbatches=2, loss_chunks=1, **TIED),
    row(padded=True, **PACKED),
    row(parallelism(fsdp_reshard_after_forward="always"), microbatches=2, **PACKED),
    row(FULL, **BOTH),
    row(EVERY_SECOND, **PACKED),
    row(BY_OPERATOR),
    row(COMPILED, microbatches=2, **TIED),
    row(REGULARISED, microbatches=2, loss_chunks=1),
]
DATA = [
    row(shard=2),
    row(shard=2, microbatches=2, **TIED),
    row(COMPILED, FULL, shard=2, **BOTH),
    row(parallelism(fsdp_reshard_after_forward="never"), shard=2, **BOTH),
    row(BY_OPERATOR, shard=4, microbatches=2, **PACKED),
    row(shard=8, **TIED),
    row(replicate=2),
    row(EVERY_SECOND, replicate=2, microbatches=2, **BOTH),
    row(replicate=4, **PACKED),
    row(INDUCTOR, replicate=2, microbatches=2),
    row(replicate=2, shard=2, **PACKED),
    row(COMPILED, FULL, replicate=2, shard=2, microbatches=2, **TIED),
    row(replicate=2, shard=4, microbatches=1, **BOTH),
    row(PARAMETERS_ON_HOST, ACTIVATIONS_ON_HOST, replicate=2, shard=2, microbatches=2, **TIED),
    row(COMPILED, BY_BUDGET, shard=2, microbatches=2, **PACKED),
    row(REGULARISED, shard=2, microbatches=2, **TIED),
    row(shard=2, padded=True, **PACKED),
]
TENSOR = [
    row(tp=2),
    row(tp=2, microbatches=2, **TIED),
    row(BY_OPERATOR, tp=2, **PACKED),
    row(parallelism(disable_loss_parallel=True), tp=2, **BOTH),
    row(FULL, tp=4, loss_chunks=1, **PACKED),
    row(EVERY_SECOND, tp=4, kv_heads=2, **TIED),
    row(tp=8, kv_heads=2),
    row(COMPILED, FULL, tp=2, **PACKED),
    row(shard=2, tp=2, **TIED),
    row(replicate=2, tp=2, microbatches=2, **PACKED),
    row(parallelism(fsdp_reshard_after_forward="always"), replicate=2, shard=2, tp=2, **BOTH),
    row(COMPILED, BY_OPERATOR, shard=2, tp=2, microbatches=2, **BOTH),
    row(shard=2, tp=4, loss_chunks=1),
    row(shard=2, tp=2, norm="layernorm", **PACKED),
    row(BY_OPERATOR, shard=2, tp=2, norm="np_layernorm"),
    row(COMPILED, FULL, tp=2, norm="fused_rmsnorm", **PACKED),
    row(FULL, PARAMETERS_ON_HOST, ACTIVATIONS_ON_HOST, shard=2, tp=2, **PACKED),
    row(REGULARISED, tp=2),
    row(REGULARISED, parallelism(disable_loss_parallel=True), tp=2, **TIED),
    row(REGULARISED, tp=4, loss_chunks=1, microbatches=2, **TIED),
]
CONTEXT = [
    row(ALLGATHER, cp=2, **TIED),
    row(ALLGATHER, EVERY_SECOND, cp=2, **PACKED),
    row(ALLGATHER_IN_ORDER, BY_OPERATOR, cp=2),
    row(ALLGATHER_IN_ORDER, cp=2, **PACKED),
    row(RING, cp=2),
    row(RING, cp=2, **PACKED),
    row(RING_IN_ORDER, cp=2, microbatches=2, **BOTH),
    row(ULYSSES, cp=2),
    row(ULYSSES, FULL, cp=2, **PACKED),
    row(ALLGATHER, cp=4, microbatches=2, **PACKED),
    row(RING, BY_OPERATOR, cp=4, **BOTH),
    row(ULYSSES, cp=8, **PACKED),
    row(RING, COMPILED, FULL, cp=2, **PACKED),
    row(ULYSSES, COMPILED, cp=2, **TIED),
    row(ULYSSES, BY_OPERATOR, cp=2, **PACKED),
    row(RING, shard=2, cp=2, microbatches=2, **PACKED),
    row(ALLGATHER, FULL, shard=2, cp=2, **TIED),
    row(ULYSSES, replicate=2, cp=2, **BOTH),
    row(ALLGATHER_IN_ORDER, replicate=2, shard=2, cp=2, **PACKED),
    row(RING, BY_OPERATOR, cp=2, tp=2, **PACKED),
    row(ALLGATHER, cp=2, tp=2, **TIED),
    row(ULYSSES, cp=2, tp=2, microbatches=2, **PACKED),
    row(RING, PARAMETERS_ON_HOST, ACTIVATIONS_ON_HOST, shard=2, cp=2, **PACKED),
    row(RING, REGULARISED, cp=2, **TIED),
    row(ULYSSES, REGULARISED, cp=2, tp=2),
]
PIPELINE = [
    row(pp=2, schedule="GPipe"),
    row(FULL, pp=2, schedule="1F1B", microbatches=2, **PACKED),
    row(pp=3, schedule="1F1B", layers=4, **PACKED),
    row(pp=4, schedule="GPipe", layers=4),
    row(PAIRS, pp=2, schedule="Interleaved1F1B", layers=4, **PACKED),
    row(pp=2, schedule="LoopedBFS", layers=4, microbatches=2),
    row(EVERY_SECOND, pp=2, schedule="InterleavedZeroBubble", layers=4),
    row(FULL, pp=2, schedule="ZBVZeroBubble", layers=4, **PACKED),
    row(pp=2, schedule="DualPipeV", layers=4),
    row(FROM_FILE, PAIRS, pp=2, **PACKED),
    row(BY_NAME, BY_OPERATOR, pp=2, schedule="1F1B", layers=4),
    row(ENDS_APART, pp=2, schedule="ZBVZeroBubble"),
    row(BY_LAYERS, pp=2, schedule="Interleaved1F1B", layers=6),
    row(COMPILED, FULL, pp=2, schedule="1F1B", microbatches=2),
    row(shard=2, pp=2, schedule="InterleavedZeroBubble", layers=4, **PACKED),
    row(FULL, shard=2, pp=3, schedule="1F1B", layers=4),
    row(parallelism(fsdp_reshard_after_forward="always"), shard=2, pp=2, schedule="GPipe"),
    row(replicate=2, pp=2, schedule="DualPipeV", layers=4, **PACKED),
    row(BY_OPERATOR, replicate=2, shard=2, pp=2, schedule="GPipe", **PACKED),
    row(shard=2, pp=2, schedule="1F1B", norm="np_layernorm"),
    row(tp=2, pp=2, schedule="ZBVZeroBubble", layers=4),
    row(PAIRS, BY_OPERATOR, tp=2, pp=2, schedule="1F1B", **PACKED),
    row(PAIRS, COMPILED, FULL, tp=2, pp=2, schedule="1F1B", **PACKED),
    row(PAIRS, RING, COMPILED, cp=2, pp=2, schedule="1F1B", **PACKED),
    row(PAIRS, RING, cp=2, pp=2, schedule="ZBVZeroBubble", layers=4, **PACKED),
    row(ULYSSES, cp=2, pp=2, schedule="GPipe"),
    row(PAIRS, ALLGATHER, FULL, cp=2, pp=2, schedule="Interleaved1F1B", layers=4, **PACKED),
    row(PARAMETERS_ON_HOST, ACTIVATIONS_ON_HOST, shard=2, pp=2, schedule="1F1B", **PACKED),
    row(REGULARISED, shard=2, pp=2, schedule="1F1B"),
    row(PAIRS, REGULARISED, tp=2, pp=2, schedule="ZBVZeroBubble", layers=4),
]
COMBINED = [
    row(RING, shard=2, cp=2, tp=2, microbatches=2, **BOTH),
    row(ULYSSES, FULL, shard=2, cp=2, tp=2, **PACKED),
    row(ALLGATHER, BY_OPERATOR, replicate=2, cp=2, tp=2, **BOTH),
    row(ULYSSES, replicate=2, shard=2, cp=2, tp=2, **PACKED),
    row(shard=2, tp=2, pp=2, schedule="Interleaved1F1B", layers=4, **PACKED),
    row(FULL, replicate=2, tp=2, pp=2, schedule="GPipe", microbatches=2),
    row(replicate=2, shard=2, tp=2, pp=2, schedule="1F1B", **PACKED),
    row(RING, shard=2, cp=2, pp=2, schedule="1F1B", **PACKED),
    row(ULYSSES, replicate=2, cp=2, pp=2, schedule="LoopedBFS", layers=4, **PACKED),
    row(ALLGATHER, replicate=2, shard=2, cp=2, pp=2, schedule="GPipe"),
    row(PAIRS, RING, cp=2, tp=2, pp=2, schedule="InterleavedZeroBubble", layers=4, **PACKED),
    row(ALLGATHER, FULL, cp=2, tp=2, pp=2, schedule="1F1B", microbatches=2),
    row(RING, shard=2, cp=2, tp=2, pp=2, schedule="1F1B", **PACKED),
    row(ULYSSES, replicate=2, cp=2, tp=2, pp=2, schedule="DualPipeV", layers=4, **PACKED),
]

OPTIMIZERS = [
    row(MUON, microbatches=2, **TIED),
    row(MUON, COMPILED, shard=2, **PACKED),
    row(MUON, shard=8, **TIED),
    row(MUON, BY_OPERATOR, replicate=2),
    row(MUON, PARAMETERS_ON_HOST, replicate=2, shard=2, microbatches=2),
    row(MUON, tp=2, **PACKED),
    row(MUON, FULL, shard=2, tp=2, **TIED),
    row(MUON_BY_NAME, tp=4, kv_heads=2),
    row(MUON, RING, shard=2, cp=2, **PACKED),
    row(MUON, shard=2, pp=2, schedule="InterleavedZeroBubble", layers=4),
    row(MUON_BY_NAME, ULYSSES, replicate=2, cp=2, tp=2),
    row(MUON, shard=2, tp=2, pp=2, schedule="1F1B", **PACKED),
    row(ADAFACTOR, shard=2, microbatches=2, **TIED),
    row(ADAFACTOR, shard=8),
    row(ADAFACTOR, COMPILED, replicate=2, shard=2, **PACKED),
    row(ADAFACTOR, PARAMETERS_ON_HOST, shard=2, tp=2, **TIED),
    row(ADAFACTOR, tp=4, kv_heads=2),
    row(ADAFACTOR, RING, replicate=2, cp=2, **PACKED),
    row(PAIRS, ADAFACTOR, tp=2, pp=2, schedule="GPipe"),
    row(SGD, FULL, shard=2, tp=2, **PACKED),
    row(SGD, replicate=2, pp=2, schedule="1F1B", microbatches=2),
    row(BF16_STATE, shard=2, tp=2, **TIED),
    row(BF16_STATE, replicate=2, pp=2, schedule="1F1B", microbatches=2),
    row(EIGHT_BITS, shard=2, tp=2, **PACKED),
    row(EIGHT_BITS, ULYSSES, FULL, replicate=2, cp=2, **TIED),
    row(EIGHT_BITS, shard=2, pp=2, schedule="GPipe"),
]
FROZEN = [
    row(FROZEN_ATTENTION, shard=2, microbatches=2, **TIED),
    row(FROZEN_START, COMPILED, FULL, shard=2, **PACKED),
    row(FEED_FORWARDS, BY_OPERATOR, replicate=2, **PACKED),
    row(FROZEN_ATTENTION, COMPILED, replicate=2, shard=2),
    row(FROZEN_ATTENTION, EVERY_SECOND, tp=2, **PACKED),
    row(FROZEN_START, shard=2, tp=2),
    row(FEED_FORWARDS, RING, shard=2, cp=2, **PACKED),
    row(FROZEN_ATTENTION, PARAMETERS_ON_HOST, ULYSSES, cp=2, tp=2),
    row(FROZEN_START, FULL, ACTIVATIONS_ON_HOST, pp=2, schedule="1F1B"),
    row(FROZEN_START, pp=4, schedule="GPipe", layers=4, microbatches=2),
    row(FROZEN_ATTENTION, shard=2, pp=2, schedule="InterleavedZeroBubble", layers=4),
    row(PAIRS, FROZEN_START, tp=2, pp=2, schedule="ZBVZeroBubble", layers=4, **PACKED),
    row(HEAD_ALONE, microbatches=2, **PACKED),
    row(HEAD_ALONE, shard=2, tp=2),
    row(PAIRS, HEAD_ALONE, tp=2, pp=2, schedule="1F1B"),
    row(MUON, FROZEN_START, shard=2, tp=2),
]

WINDOWED = [
    row(microbatches=2, window=5, **TIED),
    row(FULL, window=5, **PACKED),
    row(COMPILED, BY_OPERATOR, shard=2, window=5, **PACKED),
    row(EVERY_SECOND, replicate=2, shard=2, microbatches=2, window=11),
    row(COMPILED, FULL, tp=2, window=11, **PACKED),
    row(shard=2, tp=2, window=2),
    row(ALLGATHER, cp=2, window=5),
    row(ALLGATHER_IN_ORDER, COMPILED, cp=4, window=11, **PACKED),
    row(RING, BY_OPERATOR, cp=2, window=11, **PACKED),
    row(RING_IN_ORDER, FULL, shard=2, cp=4, window=5),
    row(ULYSSES, cp=2, window=5),
    row(ULYSSES, COMPILED, cp=2, tp=2, window=11, **PACKED),
    row(FULL, pp=2, schedule="1F1B", window=5, **PACKED),
    row(COMPILED, shard=2, pp=2, schedule="Interleaved1F1B", layers=4, window=11),
    row(PAIRS, RING, cp=2, tp=2, pp=2, schedule="GPipe", window=11, **PACKED),
]

TABLE = [*ONE, *DATA, *TENSOR, *CONTEXT, *PIPELINE, *COMBINED, *OPTIMIZERS, *FROZEN, *WINDOWED]
TABLE += [*LONG_CONTEXT, *OWN_MODELS, *TIED_PIPELINES, *ADAPTED, *FROZEN_MODELS]


def dims_of(case: Case) -> ParallelDims:
    """The degrees of a row."""
    return ParallelDims.from_section(case.config().parallelism, case.world_size)


def kinds_of(case: Case) -> frozenset[str]:
    """The parallelisms of a row: one of ddp, fsdp and hsdp, tp, cp, pp."""
    dims = dims_of(case)
    kinds = {axis for axis in ("tp", "cp", "pp") if getattr(dims, axis) > 1}
    if dims.dp > 1:
        kinds |= {"ddp" if dims.dp_shard == 1 else "fsdp" if dims.dp_replicate == 1 else "hsdp"}
    return frozenset(kinds)


def special_of(case: Case) -> Iterator[str]:
    """What the row has beside its mesh, in words."""
    config = case.config()
    mesh, recompute = config.parallelism, config.activation_checkpoint
    if case.family != Case.family:
        yield case.family
    if case.pp > 1:
        yield "CSV" if mesh.pipeline_parallel_schedule_csv else mesh.pipeline_parallel_schedule
    if case.cp > 1:
        yield f"{mesh.context_parallel_method} {mesh.context_parallel_load_balancer}"
    if mesh.module_fqns_per_model_part:
        yield "stages by name"
    if mesh.pipeline_parallel_layers_per_stage:
        yield "stages by layers"
    if mesh.pipeline_parallel_microbatch_size > 1:
        yield f"microbatch size {mesh.pipeline_parallel_microbatch_size}"
    if case.microbatches > 1:
        yield f"accumulates {case.microbatches}"
    if case.tied:
        yield "tied"
    if case.document_mask:
        yield "padded" if case.padded else "packed"
    if case.window is not None:
        yield f"window of {case.window}"
    if case.args.get("rope_scaling_type"):
        yield case.args["rope_scaling_type"]
    if recompute.mode != "none":
        option = recompute.selective_ac_option if recompute.mode == "selective" else recompute.mode
        yield f"checkpointing {option.replace('_', ' ')}"
    if config.training.enable_cpu_offload:
        yield "parameters on the host"
    if recompute.offload:
        yield "activations on the host"
    if config.optimizer.name != "AdamW":
        by_name = " by name" if config.optimizer.args.get("patterns") else ""
        yield f"{config.optimizer.name}{by_name}"
    if "freeze" in config.model.handlers:
        settings = case.settings["handlers"]["freeze"]
        yield f"frozen {next(words for words, other in FREEZES.items() if other == settings)}"
    if adapters := kind_of(case):
        yield adapters
    if "compile" in config.model.handlers:
        yield f"compiled {case.settings['handlers']['compile']['backend']}"
    if mesh.fsdp_reshard_after_forward != "default":
        yield f"reshard {mesh.fsdp_reshard_after_forward}"
    if case.loss_chunks != Case.loss_chunks:
        yield f"loss chunks {case.loss_chunks}"
    yield from words_of(loss_settings(config.loss))
    if mesh.disable_loss_parallel:
        yield "logits gathered"
    if case.kv_heads != Case.kv_heads:
        yield f"{case.kv_heads} key heads"
    if case.layers != Case.layers:
        yield f"{case.layers} layers"
    if case.norm != Case.norm:
        yield case.norm


def name_of(case: Case) -> str:
    """A row's mesh and what is special, in words."""
    return ", ".join([dims_of(case).describe(), *special_of(case)])


def reference_of(case: Case) -> Case:
    """One process with the same model and optimizer; the fused norm has to equal the usual one."""
    model = ("family", "args", "layers", "heads", "kv_heads", "tied", "document_mask", "window")
    norm = {"fused_rmsnorm": "rmsnorm"}.get(case.norm, case.norm)
    settings = {key: case.settings[key] for key in ("loss", "optimizer") if key in case.settings}
    settings = in_each_step(settings | kept_handlers(case))
    same = {name: getattr(case, name) for name in model}
    return Case(norm=norm, settings=settings, microbatches=reference_microbatches(case), **same)
