"""Tables of the keys of TorchTitan's three TOML releases that no section has today.

A key is looked up here only if no section has it. Whoever builds one of the features of
`NOT_BUILT` adds the field to its section and takes the entry out; a test fails while it is in both.
`translate.py` applies the tables.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "experimental.enable_compiled_autograd": "parallelism.enable_compiled_autograd",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_schedule_csv": "parallelism.pipeline_parallel_schedule_csv",
    "experimental.pipeline_parallel_split_points": "parallelism.pipeline_parallel_split_points",
    "job.print_args": "job.print_config",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "memory_estimation.enabled": "memory_estimation.enable",
    "model.hf_assets_path": "model.tokenizer_path",
    "training.batch_size": "training.local_batch_size",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.deterministic": "debug.deterministic",
    "training.disable_loss_parallel": "parallelism.disable_loss_parallel",
    "training.seed": "debug.seed",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
}
"""The same setting, with the same values, under another name."""

HANDLERS = "model.handlers"

OTHER_TOOLS = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "batch_size": "training.local_batch_size",
    "bf16": "training.mixed_precision_param",
    "checkpoint_dir": "checkpoint.initial_load_path",
    "clip_grad_norm": "training.max_norm",
    "dataset_text_field": "data.text_column",
    "enable_activation_checkpointing": "activation_checkpoint.mode",
    "enable_activation_offloading": "activation_checkpoint.offload",
    "enable_async_checkpointing": "checkpoint.async_mode",
    "eval_steps": "validation.freq",
    "fsdp_cpu_offload": "training.enable_cpu_offload",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_checkpointing": "activation_checkpoint.mode",
    "learning_rate": "optimizer.lr",
    "log_every_n_steps": "metrics.log_freq",
    "logging_steps": "metrics.log_freq",
    "lora_alpha": "handlers.lora.alpha",
    "lora_dropout": "handlers.lora.dropout",
    "lora_rank": "handlers.lora.rank",
    "lr_scheduler_type": "lr_scheduler.decay_type",
    "max_grad_norm": "training.max_norm",
    "max_length": "training.seq_len",
    "max_seq_len": "training.seq_len",
    "max_steps": "training.steps",
    "max_steps_per_epoch": "training.steps",
    "num_train_epochs": "data.epochs",
    "num_warmup_steps": "lr_scheduler.warmup_steps",
    "optim": "optimizer.name",
    "optimizer_in_bwd": "optimizer.early_step_in_backward",
    "output": "job.dump_folder",
    "output_dir": "job.dump_folder",
    "per_device_eval_batch_size": "validation.local_batch_size",
    "per_device_train_batch_size": "training.local_batch_size",
    "prompt_template": "data.chat_template",
    "report_to": "metrics.enable_wandb",
    "run_val_every_n_steps": "validation.freq",
    "save_steps": "checkpoint.interval",
    "save_total_limit": "checkpoint.keep_latest_k",
    "target_modules": "handlers.lora.targets",
    "torch_compile": HANDLERS,
    "use_dora": "handlers.lora.dora",
}
"""Names in torchtune and transformers (docs/start/from_torchtune.md, from_transformers.md)."""

OTHER_VALUES = {
    "bf16": "bfloat16 is the default",
    "clip_grad_norm": "inf for null",
    "enable_activation_checkpointing": '"full" for true',
    "enable_async_checkpointing": '"async" for true',
    "gradient_accumulation_steps": "batch size x accumulation x data-parallel processes",
    "gradient_checkpointing": '"full" for true',
    "max_grad_norm": "inf for 0",
    "max_steps_per_epoch": "the steps of the whole run",
    "report_to": "true for Weights & Biases; or metrics.enable_tensorboard",
    "torch_compile": '["compile"] for true',
}
"""Notes on the value here, for names of `OTHER_TOOLS` whose values differ."""

MISNAMED = {
    **OTHER_TOOLS,
    "_base_": "base",
    "extends": "base",
    "include": "base",
    "inherits": "base",
    "optimizer.learning_rate": "optimizer.lr",
    "training.enable_activation_offloading": "activation_checkpoint.offload",
    "training.learning_rate": "optimizer.lr",
}
"""Names that no release has had, and that people write all the same."""


_METHODS = {"allgather": "allgather", "alltoall": "ring"}
CONVERTED: dict[str, tuple[str, Mapping[Any, Any]]] = {
    "experimental.context_parallel_rotate_method": (
        "parallelism.context_parallel_method",
        _METHODS,
    ),
    "metrics.rank_0_only": ("metrics.save_for_all_ranks", {True: False, False: True}),
    "mx.recipe_name": ("handlers.mxfp8.recipe_name", {"mxfp8": "mxfp8_cublas"}),
    "mx.use_fp8_dim1_cast_triton_kernel": (
        "handlers.mxfp8.mxfp8_dim1_cast_kernel_choice",
        {True: "triton", False: "torch"},
    ),
    "optimizer.fused": ("optimizer.implementation", {True: "fused", False: "foreach"}),
    "parallelism.context_parallel_rotate_method": ("parallelism.context_parallel_method", _METHODS),
}
"""Keys with another name today and other values; one that is not listed stays as it is."""

CUSTOM_IMPORT = "experimental.custom_import"
"""One module as text, "" for none; a list today, `job.custom_import`."""

SPLIT_POINTS = "experimental.pipeline_parallel_split_points"
"""A list, or a text with commas, which TorchTitan split."""

CONVERTERS = "model.converters"
CONVERTER_NAMES = {"mx": "mxfp8", "quantize.linear.float8": "float8", "quantize.linear.mx": "mxfp8"}
"""Handlers that had other names as converters."""

HANDLER_SWITCHES = {
    "float8.enable_float8_linear": "float8",
    "training.compile": "compile",
    "compile.enable": "compile",
}
"""Switches that put a handler into `model.handlers`, in the order in which handlers go there."""

_FLOAT8: dict[str, Any] = {
    "emulate": False,
    "enable_fsdp_float8_all_gather": False,
    "filter_fqns": [],
    "precompute_float8_dynamic_scale_for_fsdp": False,
    "recipe_name": "",
}
_MX = {"filter_fqns": [], "mxfp8_dim1_cast_kernel_choice": "", "recipe_name": ""}
HANDLER_TABLES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "compile": ("compile", {"backend": ""}),
    "float8": ("float8", _FLOAT8),
    "mx": ("mxfp8", {"filter_fqns": []}),
    "quantize.linear.float8": ("float8", _FLOAT8),
    "quantize.linear.mx": ("mxfp8", _MX),
}
HANDLER_SETTINGS = {
    f"{table}.{key}": (f"handlers.{handler}.{key}", value)
    for table, (handler, settings) in HANDLER_TABLES.items()
    for key, value in settings.items()
}
"""Settings that are in [handlers.NAME] today: that key, and a value of the type. Without the
handler they mean nothing, and are left out."""

COMPONENTS = "compile.components"
MICROBATCHES = "experimental.pipeline_parallel_microbatches"
MICROBATCH_SIZE = "parallelism.pipeline_parallel_microbatch_size"
BY_OTHER_KEYS: dict[str, Any] = {COMPONENTS: [], MICROBATCHES: 0}
"""Keys whose meaning depends on other keys, with a value of their type."""

OLD_VALUES = {("model.name", "llama"): "llama3"}
"""Values of today's keys that have another name today."""

NONE_MEANS: dict[str, Any] = {
    "debug.seed": 0,
    "parallelism.context_parallel_load_balancer": "none",
    "parallelism.module_fqns_per_model_part": [],
    "parallelism.pipeline_parallel_schedule_csv": "",
}
"""Keys that took `None` on the command line, and have a value for it today."""

IGNORED = {
    "activation_checkpoint.early_stop": False,
    "checkpoint.initial_load_in_hf": False,
    "float8.force_recompute_fp8_weight_in_bwd": False,
    "job.save_config_file": "",
    "job.use_for_integration_test": False,
    "training.dataloader.persistent_workers": False,
    "validation.dataloader.persistent_workers": False,
}
"""Keys that change nothing here, with a value of their type. Recomputation stops early in any case,
worker processes live as long as the run, and those of a validation as long as it takes."""
REASONS = {
    "checkpoint.initial_load_in_hf": "the content of initial_load_path says what it is",
    "float8.force_recompute_fp8_weight_in_bwd": "torchao no longer has it",
    "job.save_config_file": "every run keeps its settings in config.toml of its folder",
}
"""Reasons that ignored keys are not needed, where that is worth telling."""


_MM_SHAPES = "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"


class Feature(NamedTuple):
    """Something that TorchTitan has and this library has not, or not yet.

    `switches` maps a key to the values with which it is off; `instead` says what to use.
    """

    name: str
    switches: Mapping[str, tuple[Any, ...]]
    instead: str = ""


NOT_BUILT = (
    Feature("debugging of activation checkpointing", {"activation_checkpoint.debug": (False,)}),
    Feature(
        "a determinism check in activation checkpointing",
        {"activation_checkpoint.determinism_check": ("default", "none")},
    ),
    Feature("recomputing matrix products by module", {_MM_SHAPES: (["moe.router.gate"], [])}),
    Feature(
        "a picture of memory budgets",
        {"activation_checkpoint.visualize_memory_budget_pareto": (False,)},
        "compare runs with different values of activation_checkpoint.memory_budget",
    ),
    Feature(
        "Hugging Face checkpoints in the run",
        {
            "checkpoint.initial_load_in_hf_quantized": (False,),
        },
    ),
    Feature(
        "a checkpoint interval in time",
        {"checkpoint.interval_type": ("steps",)},
        "set checkpoint.interval to a number of steps: ranks count the same steps, and"
        " their clocks differ",
    ),
    Feature(
        "a custom class of arguments",
        {"experimental.custom_args_module": ("",), "job.custom_config_module": ("",)},
        "register what is yours in a module that job.custom_import names; its settings go"
        " into [model.args] or [handlers.NAME]",
    ),
    Feature(
        "fault tolerance by replicas",
        {"fault_tolerance.enable": (False,), "fault_tolerance.semi_sync_method": ("",)},
    ),
    Feature(
        "memory estimation by this key",
        {"memory_estimation.enable": (False,)},
        'dry-run a step with comm.mode = "fake_backend"',
    ),
    Feature(
        "a mixture of experts",
        {
            "debug.moe_force_load_balance": (False,),
            "parallelism.expert_parallel_degree": (1,),
            "parallelism.expert_tensor_parallel_degree": (1,),
        },
    ),
    Feature("compiled autograd", {"parallelism.enable_compiled_autograd": (False,)}),
)
"""Keys of features that do not exist: accepted while they are off, refused by name when not."""

NOT_BUILT_SETTINGS: dict[str, Any] = {
    "checkpoint.enable_ft_dataloader_checkpoints": True,
    "fault_tolerance.fragment_sync_delay": 0,
    "fault_tolerance.fragment_update_alpha": 0.0,
    "fault_tolerance.group_size": 0,
    "fault_tolerance.min_replica_size": 1,
    "fault_tolerance.process_group": "gloo",
    "fault_tolerance.process_group_timeout_ms": 10000,
    "fault_tolerance.replica_id": 0,
    "fault_tolerance.should_quantize": False,
    "fault_tolerance.sync_steps": 5,
    "memory_estimation.disable_fake_mode": False,
    "parallelism.expert_parallel_comm_backend": "standard",
    "parallelism.pipeline_parallel_expert_parallel_overlap": True,
    "quantize.grouped_mm.float8.fqns": [],
    "quantize.grouped_mm.mx.fqns": [],
    "quantize.grouped_mm.mx.recipe_name": "mxfp8",
}
"""Settings of these features: nothing reads them while the feature is off."""

TODAY = {
    **RENAMED,
    **{name: today for name, (today, _) in CONVERTED.items()},
    **dict.fromkeys([*HANDLER_SWITCHES, CONVERTERS], HANDLERS),
    **{name: today for name, (today, _) in HANDLER_SETTINGS.items()},
    CUSTOM_IMPORT: "job.custom_import",
    MICROBATCHES: MICROBATCH_SIZE,
}
"""The key to write instead of an older one."""

EXAMPLES: dict[str, Any] = {
    **{name: next(iter(values)) for name, (_, values) in CONVERTED.items()},
    **dict.fromkeys(HANDLER_SWITCHES, False),
    **{name: value for name, (_, value) in HANDLER_SETTINGS.items()},
    **{name: off[0] for feature in NOT_BUILT for name, off in feature.switches.items()},
    **NOT_BUILT_SETTINGS,
    **IGNORED,
    **BY_OTHER_KEYS,
    CONVERTERS: [],
    CUSTOM_IMPORT: "",
}
"""A value of the type of each key that is not only renamed."""

OLD_KEYS = dict.fromkeys((*TODAY, *EXAMPLES))
