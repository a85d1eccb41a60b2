"""The handler `compile`: marks every block, for the compile pass to find."""

from torch import nn

from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.compile_settings import CompileSettings
from torchtitan.handlers.registry import handler_settings
from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.compile import CompileOptions, mark_for_compile


class CompileHandler:
    """Compiles each block as one graph."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        settings: CompileSettings = handler_settings(job_config, "compile")
        self.options = CompileOptions(backend=settings.backend)

    def convert(self, model: nn.Module) -> None:
        """Mark the blocks; the pass compiles them once everything inside them is settled."""
        assert isinstance(model, LanguageModel)
        for block in model.blocks().values():
            mark_for_compile(block, self.options)

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""
