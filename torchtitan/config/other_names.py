"""TorchTitan's keys that are spelt differently here, or that nothing here answers to yet.

Looked up before any guess by similarity, which would lead a reader of an older TOML astray:
`metrics.enable_wandb` resembles `metrics.enable_tensorboard`.
"""

RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "compile.backend": "handlers.compile.backend",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.context_parallel_rotate_method": "parallelism.context_parallel_method",
    "experimental.custom_import": "job.custom_import",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_schedule_csv": "parallelism.pipeline_parallel_schedule_csv",
    "job.print_args": "job.print_config",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "model.converters": "model.handlers",
    "model.hf_assets_path": "model.tokenizer_path",
    "optimizer.learning_rate": "optimizer.lr",
    "parallelism.context_parallel_rotate_method": "parallelism.context_parallel_method",
    "training.batch_size": "training.local_batch_size",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.deterministic": "debug.deterministic",
    "training.disable_loss_parallel": "parallelism.disable_loss_parallel",
    "training.learning_rate": "optimizer.lr",
    "training.seed": "debug.seed",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
}
"""The same setting under another name."""

SWITCHES = {
    "compile.enable": ("model.handlers", '["compile"]'),
    "optimizer.fused": ("optimizer.implementation", '"fused"'),
    "training.compile": ("model.handlers", '["compile"]'),
}
"""Switches whose "on" is a value of another key. "Off" needs no key at all."""

MISSING_SECTIONS = frozenset(
    ["fault_tolerance", "float8", "memory_estimation", "mx", "quantize", "validation"]
)

_MISSING = {
    "activation_checkpoint": "debug determinism_check early_stop memory_budget"
    " per_op_sac_force_recompute_mm_shapes_by_fqns visualize_memory_budget_pareto",
    "checkpoint": "enable_ft_dataloader_checkpoints initial_load_in_hf"
    " initial_load_in_hf_quantized interval_type last_save_in_hf",
    "comm": "save_traces_file_prefix save_traces_folder trace_buf_size",
    "compile": "components",
    "debug": "moe_force_load_balance",
    "experimental": "custom_args_module enable_compiled_autograd pipeline_parallel_microbatches"
    " pipeline_parallel_split_points",
    "job": "custom_config_module save_config_file use_for_integration_test",
    "lr_scheduler": "total_steps",
    "metrics": "enable_wandb rank_0_only save_for_all_ranks",
    "optimizer": "early_step_in_backward",
    "parallelism": "enable_compiled_autograd expert_parallel_comm_backend expert_parallel_degree"
    " expert_tensor_parallel_degree pipeline_parallel_expert_parallel_overlap"
    " pipeline_parallel_split_points",
    "profiling": "enable_memory_snapshot save_memory_snapshot_folder",
    "training": "enable_cpu_offload gc_debug",
    "training.dataloader": "persistent_workers",
}

MISSING = frozenset(
    f"{section}.{key}" for section, keys in _MISSING.items() for key in keys.split()
)
"""Keys without a counterpart, beside those of `MISSING_SECTIONS`."""


def is_missing(name: str) -> bool:
    """Whether a dotted key or a section is one of TorchTitan's that is not available yet."""
    return name in MISSING or name.split(".")[0] in MISSING_SECTIONS


def is_another_name(name: str) -> bool:
    """Whether `name` is a key of TorchTitan's that this module can say something about."""
    return name in RENAMED or name in SWITCHES or is_missing(name)
