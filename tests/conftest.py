"""Fixtures of all tests, and how they are spread over the processes of pytest-xdist."""

import hashlib
import logging
import os
import pickle
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import pytest

from tests.forked import keep_preloaded
from tests.pool import GlooPool
from tests.smollm2 import small_smollm2, smollm2, smollm2_gguf  # noqa: F401  (fixtures)
from torchtitan.models.registry import MODELS

if TYPE_CHECKING:  # torch takes seconds to import, which would delay the start of all processes
    from tests.distributed import tiny

keep_preloaded()

# A shell's `nohup` and `&` leave these ignored, and what tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

PARTS = {
    "tests/distributed/test_slurm.py": 1,
    "tests/faults/test_soak.py": 1,
    "tests/parity/test_table.py": 8,
    "tests/distributed/test_runs.py": 1,
    "tests/distributed/test_ring_attention.py": 1,
    "tests/faults/test_run_faults.py": 2,
    "tests/meta/test_notebook.py": 1,
    "tests/distributed/test_handlers_on_meshes.py": 1,
    "tests/meta/test_dry_runs.py": 8,
    "tests/meta/test_commands_run.py": 1,
    "tests/parity/test_checkpoints_move.py": 1,
    "tests/unit/data/test_data_order.py": 1,
    "tests/unit/data/test_sources_order.py": 1,
    "tests/meta/test_scripts.py": 2,
    "tests/parity/test_the_table_catches.py": 1,
    "tests/unit/metrics/test_wandb_sink.py": 1,
    "tests/unit/data/test_worker_processes.py": 1,
    "tests/meta/test_linters.py": 4,
}
"""The files that take longest, these first, and into how many parts each is cut.

Tests whose names agree up to a colon stay together.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--fault F23`: the tests that prove a fault of docs/design/reliability.md."""
    parser.addoption("--fault", action="append", help="only tests that are marked with this fault")


def pytest_configure(config: pytest.Config) -> None:
    """Start importing torch in the fork server while the tests are collected."""
    if hasattr(config, "workerinput"):
        forkserver.ensure_running()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the longest files, or one of them is all that runs at the end; see `--fault`."""
    wanted = set(config.getoption("--fault") or ())
    if wanted:
        marks = [(item, item.iter_markers("fault")) for item in items]
        items[:] = [item for item, found in marks if any(wanted & {*mark.args} for mark in found)]
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(PARTS)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file, or part of one, to one process, so that its fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            together = nodeid.partition(": ")[0]
            return f"{name} {zlib.crc32(together.encode()) % PARTS.get(name, 1)}"

    return ByPart(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the schedules that are rejected with this version of torch."""
    call = getattr(item, "callspec", None)
    if call is None or "tests.distributed.tiny" not in sys.modules:
        return
    from tests.distributed import tiny
    from torchtitan.parallel.pipeline.schedules import SCHEDULES
    from torchtitan.preflight.pipeline_parallel import torch_splits_backward

    for case in [] if torch_splits_backward() else call.params.values():
        if isinstance(case, tiny.Case) and SCHEDULES[case.schedule].splits_backward:
            pytest.skip("torch cannot split the backward")


@pytest.fixture(autouse=True)
def own_families_are_unknown() -> None:
    """Forget the families of other tests: some tests list all that are registered."""
    own_models: Any = sys.modules.get("tests.distributed.own_models")
    for family in own_models.FAMILIES if own_models else ():
        MODELS._registered.pop(family.name, None)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A rank that shows its messages does more, so no test leaves the level to the next ones."""
    logger = logging.getLogger("torchtitan")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Processes joined by gloo; see `GlooPool.run`."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Callable[[tiny.Case], tiny.Result]]":
    """Return the result of a case on one process, trained once for all processes of pytest-xdist.

    In a pool of its own: `gloo_pool` may have kept groups for the meshes that are compared.
    """
    from tests.distributed import tiny

    pool, folder = GlooPool(), tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent

    def train(case: tiny.Case) -> tiny.Result:
        path = folder / f"one-process-{hashlib.sha256(repr(case).encode()).hexdigest()}"
        if not path.exists():
            own = path.with_suffix(f".{os.getpid()}")
            own.write_bytes(pickle.dumps(pool.run(1, tiny.train, case)[0]))
            own.replace(path)
        return pickle.loads(path.read_bytes())  # noqa: S301 (its own)

    yield train
    pool.close()
