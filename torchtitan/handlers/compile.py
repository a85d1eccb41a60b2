"""The handler `compile`: mark every block for compilation."""

from torch import nn

from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings
from torchtitan.handlers.settings import CompileSettings
from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.compile import mark_for_compile


class CompileHandler(ModelHandler):
    """Compiles each block as one graph."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        settings: CompileSettings = handler_settings(job_config, "compile")
        self.backend = settings.backend

    def convert(self, model: nn.Module) -> None:
        """Mark the blocks; they are compiled once parallelism has changed what is inside them."""
        assert isinstance(model, LanguageModel)
        for block in model.blocks().values():
            mark_for_compile(block, self.backend)
