"""Every TOML of train_configs/ runs a step at its own scale, on fake tensors, by the command line.

Each dry run is a process of its own. They run two at a time, and a test waits for its own one.
"""

import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import runs
from tests.forked import execute
from tests.meta.test_train_configs import CONFIGS, ROOT, first_comment

MOST_SECONDS = 60
"""Of a processor: that others are at work on this machine does not count."""
MOST_GIB = 4


class Place(NamedTuple):
    """A rank of a run that is not there."""

    config: str
    world_size: int
    rank: int

    def __str__(self) -> str:
        return f"{self.config}-{self.rank}-of-{self.world_size}"


class Outcome(NamedTuple):
    status: int
    seconds: float
    peak_gib: float
    output: str


def places(config: str, *shares: float, world_size: int | None = None) -> list[Place]:
    """The last rank of each share of the processes, which the TOML's first comment states."""
    stated = re.search(r"WORLD_SIZE=(\d+)", first_comment(ROOT / f"train_configs/{config}.toml"))
    assert stated
    size = int(stated[1]) if world_size is None else world_size
    return [Place(config, size, max(0, int(size * share) - 1)) for share in shares]


NAMES = [path.stem for path in CONFIGS]
OFTEN = [
    *(place for name in NAMES for place in places(name, 0)),
    *places("llama3_405b", 0.4, 1),
    *places("llama3_405b", 0.4, 1, world_size=4096),
]
RARELY = sorted({place for name in NAMES for place in places(name, 0.4, 0.5, 1)} - {*OFTEN})


_MEASURED = """
import resource, sys
from torchtitan.cli import main

status = main(["train", *sys.argv[1:]])
usage = resource.getrusage(resource.RUSAGE_SELF)
print("\\nMEASURED", usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)
sys.exit(status)
"""


def dry_run(place: Place, folder: Path) -> Outcome:
    """Run the program in `folder`."""
    config = ROOT / f"train_configs/{place.config}.toml"
    place_in_world = {"WORLD_SIZE": str(place.world_size), "RANK": str(place.rank)}
    done = execute(
        [
            sys.executable,
            "-c",
            _MEASURED,
            "--comm.mode=fake_backend",
            f"--job.config_file={config}",
        ],
        env=runs.environment() | place_in_world,
        cwd=folder,
        timeout=500,
    )
    output, _, measured = done.stdout.partition("MEASURED ")
    seconds, peak_gib = map(float, measured.split())
    return Outcome(done.returncode, seconds, peak_gib, output + done.stderr)


@pytest.fixture(scope="module")
def dry_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Place, tuple[Future[Outcome], Path]]]:
    """Those of the tests that are going to run."""
    items = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [spec.params["place"] for spec in items if spec and "place" in spec.params]
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for place in wanted:
            folder = tmp_path_factory.mktemp("dry_run")
            started[place] = pool.submit(dry_run, place, folder), folder
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "place",
    [*OFTEN, *(pytest.param(place, marks=pytest.mark.nightly) for place in RARELY)],
    ids=str,
)
@pytest.mark.timeout(600)
def test_dry_run(place: Place, dry_runs: dict[Place, tuple[Future[Outcome], Path]]):
    future, folder = dry_runs[place]
    outcome = future.result()
    assert outcome.status == 0, outcome.output
    assert outcome.seconds < MOST_SECONDS
    assert outcome.peak_gib < MOST_GIB
    assert f"runs on rank {place.rank}" in outcome.output
    assert not list(folder.iterdir()), "a dry run leaves nothing behind"


def test_the_largest_are_among_them():
    assert {("llama3_405b", 512), ("llama3_405b", 4096)} <= {place[:2] for place in OFTEN}
    assert {place.config for place in OFTEN} == {path.stem for path in CONFIGS}


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_four_dimensions_show_the_losses_of_one_process(tmp_path: Path):
    """As the first comment of debug_4d.toml promises."""
    config = ROOT / "train_configs/debug_4d.toml"
    curves = []
    for processes in (8, 1):
        folder = tmp_path / str(processes)
        command = runs.command(folder, processes=processes)
        command[command.index("torchtitan.train") + 1] = f"--job.config_file={config}"
        if processes == 1:
            comment = first_comment(config)
            command += re.findall(r"--parallelism\S+|(?<=_degree )1", comment)
        done = execute(command, env=runs.environment(), timeout=500)
        assert done.returncode == 0, done.stderr
        curves.append(runs.curve(folder))
    assert len(curves[0]) == 10
    for several, one in zip(*curves, strict=True):
        assert several == pytest.approx(one, rel=1e-9)
