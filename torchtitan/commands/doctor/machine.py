"""Findings about a process of a run on this machine: device, kernels, threads."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from torchtitan.commands.doctor.findings import Finding, of_problem
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.preflight import hardware as checks
from torchtitan.utils.device import GIB, device_type, set_up_process
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.host import tune_cpu_allocator


def context_of_machine(config: JobConfig, place: ProcessEnvironment) -> RunContext:
    """Return the context with the device that this process would train on."""
    try:
        kind = device_type(config.job.device)
    except RuntimeError:  # the check of the hardware reports it
        kind = "cuda"
    return RunContext(config, place.world_size, kind)


def machine_findings(context: RunContext, place: ProcessEnvironment) -> Iterator[Finding]:
    """Yield the findings. Sets up threads and allocator as a run does."""
    problems = checks.check_environment(context)
    yield from (of_problem(problem) for problem in problems)
    yield Finding(dist.is_available() and dist.is_gloo_available(), "gloo", "for CPUs")
    if torch.cuda.is_available():
        yield Finding(dist.is_nccl_available(), "nccl", "for GPUs")
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / GIB
            text = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"
            yield Finding(True, f"GPU {index}", text)
    else:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding(None, "GPUs", f"none usable (torch built {built})")
    if problems and context.device_type == "cuda":
        return
    setting = f"job.device = {context.config.job.device}"
    yield Finding(True, "device", f"{_device(context, place)} ({setting})")
    yield Finding(None, "attention", _attention(context))
    if context.device_type == "cpu":
        yield Finding(None, "CPU kernels", _cpu_kernels())
        yield Finding(None, "allocator", _allocator(context.config))
    else:
        yield Finding(None, "allocator", f"CUDA's, {torch.cuda.get_allocator_backend()}")
    set_up_process(context.config.debug.threads, place, context.config.debug.seed)
    setting = f"debug.threads = {context.config.debug.threads}"
    yield Finding(None, "threads", f"{torch.get_num_threads()} for each process ({setting})")


def _device(context: RunContext, place: ProcessEnvironment) -> str:
    if context.device_type == "cpu":
        return "cpu"
    return f"cuda:{place.local_rank}, {torch.cuda.get_device_name(place.local_rank)}"


def _attention(context: RunContext) -> str:
    """Name the kernel that attention uses."""
    config = context.config
    if config.parallelism.context_parallel_degree > 1:
        method = config.parallelism.context_parallel_method
        return f"over the ranks of cp, by {method}"
    args = model_args(context.config.model)
    masked = ["documents"] * config.training.document_mask
    masked += ["a window"] * (args is not None and args.attention_window() is not None)
    if "flex_attention" in config.model.handlers:
        return "FlexAttention with the block mask of handlers.flex_attention, compiled"
    if not masked:
        return "scaled_dot_product_attention, causal (a flash kernel where there is one)"
    if context.device_type == "cuda":
        return f"FlexAttention with a block mask of {' and '.join(masked)}, compiled"
    if masked == ["documents"]:
        return "scaled_dot_product_attention, causal, document by document"
    return f"scaled_dot_product_attention with a mask of {' and '.join(masked)}"


def _cpu_kernels() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    one_dnn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    return f"{capability}, {one_dnn}"


def _allocator(config: JobConfig) -> str:
    if config.debug.cpu_allocator == "system":
        return "the system's, untuned (debug.cpu_allocator)"
    if tune_cpu_allocator():
        return "glibc's, tuned to keep its memory (debug.cpu_allocator)"
    return "the system's, which is not glibc's and cannot be tuned"
