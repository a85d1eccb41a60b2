"""Checks of this machine. They look at devices without using them."""

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.utils.environment import EnvironmentFaults, read_environment

MINIMUM_TORCH = (2, 11)
_BFLOAT16_CAPABILITY = (8, 0)


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check the torch version and, for CUDA, the devices. Imports torch; makes no CUDA context."""
    import torch

    issues = []
    installed = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if installed < MINIMUM_TORCH:
        fix = f"install torch {_dotted(MINIMUM_TORCH)} or newer"
        issues.append(ConfigIssue("torch", f"version {torch.__version__} is too old", fix))
    if context.device_type == "cuda":
        issues += _cuda(context)
    return issues


def _cuda(context: RunContext) -> list[ConfigIssue]:
    import torch

    if not torch.cuda.is_available():
        if context.config.job.device == "auto":
            return []  # the run will take the CPU
        fix = 'install a torch with CUDA and its driver, or set it to "cpu" or "auto"'
        return [ConfigIssue("job.device", "no CUDA device can be used", fix, "cuda")]
    devices = torch.cuda.device_count()
    try:
        local_rank = read_environment().local_rank
    except EnvironmentFaults:
        return []  # `--check` of another machine's world size
    if local_rank < devices:
        return _bfloat16(context, local_rank)
    problem = f"there are {devices} visible CUDA devices"
    fix = f"start at most {devices} processes per machine, or set job.device to cpu"
    return [ConfigIssue("LOCAL_RANK", problem, fix, local_rank, local=True)]


def _bfloat16(context: RunContext, local_rank: int) -> list[ConfigIssue]:
    """Check for GPUs that emulate bfloat16, many times slower than float32."""
    import torch

    if torch.version.hip is not None:
        return []
    capability = torch.cuda.get_device_capability(local_rank)
    training = context.config.training
    problem = f"the GPU has compute capability {_dotted(capability)}, and bfloat16 needs"
    return [
        ConfigIssue(key, f"{problem} {_dotted(_BFLOAT16_CAPABILITY)}", 'set it to "float32"', value)
        for key, value in (
            ("training.dtype", training.dtype),
            ("training.mixed_precision_param", training.mixed_precision_param),
        )
        if value == "bfloat16" and capability < _BFLOAT16_CAPABILITY
    ]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
