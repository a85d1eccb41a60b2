"""`model.print_after_conversion`: the model as the handlers leave it, told once."""

import contextlib
import io

import pytest
from torch import nn

from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import HANDLERS, register_handler
from torchtitan.training import model_builder
from torchtitan.utils.logging import init_logging


class Renamed(nn.SiLU):
    """Shows that a handler was here."""


class Marks(ModelHandler):
    def convert(self, model: nn.Module) -> None:
        model.mark = Renamed()


def log_of_building(world: DistributedContext, case: Case) -> str:
    if "marks" not in HANDLERS:  # in a rank's process only, where no other test looks
        register_handler("marks")(Marks)
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    with contextlib.redirect_stderr(io.StringIO()) as log:
        init_logging(world.rank)
        model_builder.build_model(config, VOCAB_SIZE, dims.build_mesh("cpu"), dims, world.device)
    return log.getvalue()


@pytest.mark.parametrize("switch", [True, False])
def test_rank_0_tells_the_model_after_the_handlers(gloo_pool: GlooPool, switch: bool) -> None:
    model = {"print_after_conversion": switch, "handlers": ["marks"]}
    case = Case(2, tp=2, settings={"model": model})
    first, second = gloo_pool.run(2, log_of_building, case)
    assert second == ""
    assert (first != "") == switch
    if switch:
        assert "(mark): Renamed()" in first
        assert "(wq): Linear(in_features=32, out_features=32, bias=False)" in first
