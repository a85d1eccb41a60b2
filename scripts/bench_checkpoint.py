"""Measures checkpoints on a CPU: saves, loads, the stall of the loop, steps beside a save.

    python scripts/bench_checkpoint.py [--megabytes 768] [--rounds 5] [PART ...]
    torchrun --nproc_per_node 2 scripts/bench_checkpoint.py

A model of square matrices, sharded over the ranks, with the moments of AdamW, is saved to one disk
in turns, and medians over the rounds are printed:

- digests: SHA-256, XXH3-128 and, if it is installed, BLAKE3, in GiB/s, on one and two threads;
- saves: ours, `torch.save` of each rank's part with a sync, and `dcp.save`; then each one's load
  (ours reads every byte twice: to verify it, and to load it);
- stalls: how long a save keeps the loop waiting in each `checkpoint.async_mode`;
- steps: how much longer steps take beside a save by our thread, at its niceness and at that of
  training, and by torch's own process (`async_checkpointer_type=PROCESS`) with cached plans.

Ratios are medians of the ratios within a round; seconds of a processor are those of the thread that
saves, without waiting. Run it on an idle machine.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtitan.utils.host import prepare_host

prepare_host()  # as a run does, before torch is imported

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import xxhash  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from torchtitan.checkpoint import async_save  # noqa: E402
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors  # noqa: E402
from torchtitan.checkpoint.store import CheckpointStore  # noqa: E402
from torchtitan.config.schema import Checkpoint  # noqa: E402
from torchtitan.distributed.context import DistributedContext, open_context  # noqa: E402
from torchtitan.utils.environment import read_environment  # noqa: E402
from torchtitan.utils.torch_compat import local_tensor  # noqa: E402

_WIDTH = 1024
_STEPS_ALONE = 8
_CHUNK = 4 * 2**20
_PARTS = ("digests", "saves", "stalls", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join(_PARTS))
    parser.add_argument("--megabytes", type=int, default=768, help="model and moments of all ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary folder without")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "localhost")
    with open_context("cpu", read_environment(), 600) as world:
        made = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder)
        bench = Bench(world, Path(world.broadcast_json(made)), options.megabytes, options.rounds)
        try:
            for part in options.parts or _PARTS:
                getattr(bench, part)()
        finally:
            shutil.rmtree(made)
            world.barrier()
            shutil.rmtree(bench.folder, ignore_errors=True)


class Seconds(float):
    """Seconds on the clock, and `own` ones of a processor in this thread."""

    def __new__(cls, clock: float, own: float) -> "Seconds":
        made = super().__new__(cls, clock)
        made.own = own
        return made

    own: float


class Bench:
    """The state that is saved, and the parts."""

    def __init__(self, world: DistributedContext, folder: Path, megabytes: int, rounds: int):
        self.world, self.folder, self.rounds = world, folder, rounds
        layers = max(1, megabytes * 2**20 // (3 * 4 * _WIDTH * _WIDTH))
        self.model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
        if world.world_size > 1:
            mesh = init_device_mesh("cpu", (world.world_size,))
            for part in (*self.model, self.model):
                fully_shard(part, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(64, _WIDTH)
        self.saved = 0
        for _ in range(3):
            self.step()
        self.gib = sum(tensor.numel() * 4 for tensor in self.tensors().values()) / 2**30
        self.print(
            f"{world.world_size} ranks, {self.gib:.2f} GiB in all, torch {torch.__version__}"
        )

    def print(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def tensors(self) -> dict[str, Tensor]:
        return model_tensors([self.model]) | optimizer_tensors([self.model], [self.optimizer])

    def step(self) -> float:
        started = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def store(self, mode: str = "disabled") -> Iterator[CheckpointStore]:
        section = Checkpoint(enable=True, async_mode=mode, keep_latest_k=2)  # type: ignore[arg-type]
        folder = self.folder / "checkpoint"
        store = CheckpointStore(section, folder, self.world, {"run_id": "bench"})
        yield store
        store.wait()

    def timed(
        self, action: Callable[..., object], *arguments: object, **named: object
    ) -> "Seconds":
        """Return the seconds until all ranks have done it, and those of a processor on this one."""
        self.world.barrier()
        started, computed = time.perf_counter(), time.thread_time()
        action(*arguments, **named)
        own = time.thread_time() - computed
        self.world.barrier()
        return Seconds(time.perf_counter() - started, own)

    def report(
        self, title: str, seconds: Mapping[str, Sequence[float]], per_second: bool = False
    ) -> None:
        """Print medians, and ratios to the first of `seconds`."""
        self.print(f"\n{title}: seconds (from - to), times as long as {next(iter(seconds))}")
        first = next(iter(seconds.values()))
        for name, values in seconds.items():
            ratio = ""
            if min(first) > 0:  # what steps lose may be less than noise
                times = statistics.median(mine / its for mine, its in zip(values, first))
                ratio = f", {times:.2f}"
            own = statistics.median(getattr(value, "own", 0.0) for value in values)
            rate = f", {self.gib / statistics.median(values):.2f} GiB/s" if per_second else ""
            cpu = f"; {own:.3f} of a processor" if own else ""
            spread = f"{min(values):.2f} - {max(values):.2f}"
            self.print(f"  {name}: {statistics.median(values):.2f} ({spread}){ratio}{rate}{cpu}")

    # --- parts ----------------------------------------------------------------------------------

    def digests(self) -> None:
        algorithms: dict[str, Callable[[], Any]] = {
            "SHA-256": hashlib.sha256,
            "XXH3-128": xxhash.xxh3_128,
        }
        with contextlib.suppress(ImportError):
            from blake3 import blake3

            algorithms["BLAKE3"] = blake3
        content = memoryview(bytearray(os.urandom(256 * 2**20)))
        for name, make in algorithms.items():
            for threads in (1, 2):
                share = len(content) // threads
                rates = []
                for _ in range(self.rounds):
                    workers = [
                        threading.Thread(target=digest, args=(make(), content[at : at + share]))
                        for at in range(0, len(content), share)
                    ]
                    started = time.perf_counter()
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()
                    rates.append(0.25 / (time.perf_counter() - started))
                self.print(f"{name}, {threads} threads: {statistics.median(rates):.2f} GiB/s")

    def saves(self) -> None:
        plain = self.folder / f"plain-{self.world.rank}.pt"
        stock = self.folder / "stock"

        def save_plain() -> None:
            torch.save(
                {name: local_tensor(t.detach()) for name, t in self.tensors().items()}, plain
            )
            with plain.open("rb") as file:
                os.fsync(file.fileno())

        def load_plain() -> None:
            loaded = torch.load(plain, weights_only=True)  # noqa: TID251 (what is measured)
            for name, tensor in self.tensors().items():
                local_tensor(tensor.detach()).copy_(loaded[name])

        def load_ours() -> None:
            found, fault = store.verify(self.saved)
            assert found is not None, fault
            store.load(found, self.tensors())

        saves: dict[str, list[Seconds]] = {"ours": [], "torch.save": [], "dcp.save": []}
        loads: dict[str, list[Seconds]] = {"ours": [], "torch.load": [], "dcp.load": []}
        with self.store() as store:
            for _ in range(self.rounds + 1):
                self.saved += 1
                if self.world.is_main:
                    shutil.rmtree(stock, ignore_errors=True)
                saves["ours"].append(self.timed(store.save, self.saved, self.tensors(), {}))
                saves["torch.save"].append(self.timed(save_plain))
                seconds = self.timed(dcp.save, self.tensors(), checkpoint_id=stock)
                saves["dcp.save"].append(seconds)
                loads["ours"].append(self.timed(load_ours))
                loads["torch.load"].append(self.timed(load_plain))
                seconds = self.timed(dcp.load, self.tensors(), checkpoint_id=stock)
                loads["dcp.load"].append(seconds)
        self.report("save", {name: values[1:] for name, values in saves.items()}, per_second=True)
        self.report("load", {name: values[1:] for name, values in loads.items()}, per_second=True)

    def stalls(self) -> None:
        stalls: dict[str, list[Seconds]] = {
            "disabled": [], "async": [], "async_with_pinned_mem": [],
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            stores = {mode: stack.enter_context(self.store(mode)) for mode in stalls}
            for _ in range(self.rounds + 1):
                for mode, store in stores.items():
                    self.step()
                    self.saved += 1
                    stalls[mode].append(self.timed(store.save, self.saved, self.tensors(), {}))
                    store.wait()
        self.report("stall", {name: values[1:] for name, values in stalls.items()})

    def steps(self) -> None:
        niceness = async_save._NICENESS
        extra: dict[str, list[float]] = {f"thread, niceness {niceness}": []}
        extra |= {"thread, niceness 0": [], "process": []}
        seconds: dict[str, list[float]] = {name: [] for name in extra}
        with self.store("async_with_pinned_mem") as store, process_saves(self.folder) as process:

            def thread_save() -> Callable[[], bool]:
                self.saved += 1
                store.save(self.saved, self.tensors(), {})
                return lambda: not async_save.is_saving()

            for turn in range(self.rounds + 1):
                for name in extra:
                    async_save._NICENESS = 0 if name.endswith(" 0") else niceness
                    alone = statistics.median(self.step() for _ in range(_STEPS_ALONE))
                    self.world.barrier()
                    started, steps = time.perf_counter(), 0
                    is_over = process(self.tensors()) if name == "process" else thread_save()
                    while not all(self.world.gather_json(is_over())):
                        self.step()
                        steps += 1
                    store.wait()
                    took = time.perf_counter() - started
                    if turn:
                        extra[name].append(took - steps * alone)
                        seconds[name].append(took)
        async_save._NICENESS = niceness
        self.report("all that steps lose to a save", extra)
        self.report("from its begin to its end", seconds)


def digest(state: Any, content: memoryview) -> None:
    for at in range(0, len(content), _CHUNK):
        state.update(content[at : at + _CHUNK])


@contextlib.contextmanager
def process_saves(
    folder: Path,
) -> Iterator[Callable[[dict[str, Tensor]], Callable[[], bool]]]:
    """Yield what begins a save by torch's process, and returns what tells whether it is over."""
    options = StagingOptions(False, True, False, False)  # shared memory, which a CPU can have
    stager, count = DefaultStager(options), 0

    def save(tensors: dict[str, Tensor]) -> Callable[[], bool]:
        nonlocal count
        count += 1
        target = folder / f"process-{count % 2}"
        if int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(target, ignore_errors=True)
        answer = dcp.async_save(
            tensors,
            checkpoint_id=target,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=stager,
            planner=DefaultSavePlanner(enable_plan_caching=True),
        )
        future: Any = getattr(answer, "upload_completion", answer)

        def is_over() -> bool:
            if future.done():
                future.result()  # raises its error
            return bool(future.done())

        return is_over

    yield save
    stager.close()


if __name__ == "__main__":
    main()
