"""The worker stage on a plain DataLoader against one on `torchdata.nodes`, on a CPU.

    python scripts/bench_loader.py [--rounds 9] [--tokens 400000] [--workers 0 1 2 3]

Both read the same lanes of the same files and must give the same samples, which is compared first.
`ours` reads and tokenises a lane in one worker process (`data/workers.py`). `nodes` reads raw rows
of all lanes in the main process, tokenises them in a `ParallelMapper`, and packs lanes in the main
process again, behind a `Prefetcher`. Both take turns; the medians of the ratios within a round are
printed, with the processor time that the main process spends, which a training loop cannot use.
"""

import argparse
import gzip
import hashlib
import json
import random
import resource
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchdata.nodes import BaseNode, ParallelMapper, Prefetcher

from torchtitan.config import JobConfig
from torchtitan.data.lanes import Lane
from torchtitan.data.loader import build_mixture
from torchtitan.data.mixture import Mixture
from torchtitan.data.packing import Packer, Piece, Position, Sample
from torchtitan.data.sources import row_tokens
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.data.workers import LaneDataset, SampleStream, workers_for

ROOT = Path(__file__).parents[1]
LANES = 8
SEQ_LEN = 2048
CHUNK_BYTES = 16 * 1024
PREFETCH = 2

RawRows = tuple[int, list[tuple[Position, Any]]]


class RowNode(BaseNode[RawRows]):
    """Raw rows, some of one lane at a time, of the lane that has the fewest bytes waiting."""

    def __init__(self, lanes: list[Lane], waiting: list[int]):
        super().__init__()
        self._rows = [_rows_for_ever(lane) for lane in lanes]
        self._waiting = waiting

    def next(self) -> RawRows:
        lane = min(range(len(self._waiting)), key=self._waiting.__getitem__)
        rows, size = [], 0
        while size < CHUNK_BYTES:
            position, row = next(self._rows[lane])
            rows.append((position, row))
            size += max(row.size, 1)
        self._waiting[lane] += size
        return lane, rows

    def get_state(self) -> dict[str, Any]:
        return {}  # positions travel with the rows


def _rows_for_ever(lane: Lane) -> Iterator[tuple[Position, Any]]:
    epoch = 0
    while True:
        for position, _, row in lane._rows(epoch, Position()):
            yield position, row
        epoch += 1


class Tokenise:
    """Rows to pieces; pickled once for each worker."""

    def __init__(self, mixture: Mixture):
        self._settings = mixture.sources[0]

    def __call__(self, item: RawRows) -> tuple[int, list[tuple[Piece | None, int]]]:
        lane, rows = item
        pieces: list[tuple[Piece | None, int]] = []
        for position, row in rows:
            tokens = row_tokens(self._settings.source, self._settings.tokenizer, row)
            is_empty = tokens is None or not len(tokens)
            pieces.append((None if is_empty else Piece(position, tokens), max(row.size, 1)))
        return lane, pieces


class NodeStream:
    """Samples of all lanes in rounds."""

    def __init__(self, mixture: Mixture, num_workers: int, method: str):
        settings = mixture.sources[0]
        self._waiting = [0] * settings.num_lanes
        lanes = [Lane(settings, index, Position()) for index in range(settings.num_lanes)]
        rows = RowNode(lanes, self._waiting)
        mapped: BaseNode[Any] = ParallelMapper(
            rows,
            Tokenise(mixture),
            num_workers=num_workers,
            method=method,  # type: ignore[arg-type]
            multiprocessing_context="forkserver" if method == "process" else None,
            snapshot_frequency=0,
        )
        self._node = Prefetcher(mapped, PREFETCH * max(num_workers, 1), snapshot_frequency=0)
        self._queues: list[deque[tuple[Piece | None, int]]] = [deque() for _ in lanes]
        self._packers = [Packer(self._pieces(index), settings.seq_len) for index in range(LANES)]
        self._turn = 0

    def __next__(self) -> Sample:
        item = self._packers[self._turn].next_sample()
        assert item is not None
        self._turn = (self._turn + 1) % LANES
        return item[0]

    def _pieces(self, lane: int) -> Iterator[Piece]:
        while True:
            while not self._queues[lane]:
                index, pieces = next(self._node)
                self._queues[index].extend(pieces)
            piece, size = self._queues[lane].popleft()
            self._waiting[lane] -= size
            if piece is not None:
                yield piece

    def close(self) -> None:
        mapper = self._node.source._it._it
        self._node._it._shutdown()
        mapper._shutdown()


class OurStream:
    """Samples of all lanes in rounds, as a run reads them."""

    def __init__(self, mixture: Mixture, num_workers: int):
        positions = dict.fromkeys(range(LANES), mixture.start())
        dataset = LaneDataset(mixture, positions, workers_for(LANES, num_workers))
        self._stream = SampleStream(dataset, PREFETCH)

    def __next__(self) -> Sample:
        sample = next(self._stream).sample
        assert sample is not None
        return sample

    def close(self) -> None:
        self._stream.close()


def write_documents(folder: Path) -> dict[str, str]:
    """Some 12 MB of documents, as lines and as compressed files."""
    generator = random.Random(0)
    words = (ROOT / "docs" / "design" / "architecture.md").read_text("utf-8").split()
    lines = [
        json.dumps({"text": " ".join(generator.choices(words, k=generator.choice([40, 200, 900])))})
        for _ in range(5000)
    ]
    (folder / "lines.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "gz").mkdir()
    for number in range(LANES):
        content = gzip.compress("\n".join(lines[number::LANES]).encode())
        (folder / "gz" / f"{number}.jsonl.gz").write_bytes(content)
    return {"lines": str(folder / "lines.jsonl"), "gzip": str(folder / "gz")}


def measure(make: Callable[[], Any], num_tokens: int) -> tuple[float, float, str]:
    """Tokens per second, seconds of the main process per million tokens, digest of the samples."""
    stream = make()
    digest = hashlib.sha256()
    for _ in range(2 * LANES):  # workers start, and fill what they hold ready
        digest.update(next(stream).tokens.tobytes())
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    count = num_tokens // SEQ_LEN
    for _ in range(count):
        digest.update(next(stream).tokens.tobytes())
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    stream.close()
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tokens = count * SEQ_LEN
    return tokens / seconds, busy / tokens * 1e6, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--tokenizer", default=str(ROOT / "tests" / "assets" / "tokenizer"))
    options = parser.parse_args()
    tokenizer = build_tokenizer(options.tokenizer)
    print("data   workers  method   nodes/ours  range        main process, s per M tokens")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_documents(Path(folder)).items():
            section = {"dataset_path": path, "seq_len": SEQ_LEN}
            config = JobConfig.model_validate({"training": section})
            mixture = build_mixture(config.training, config.data, 7, tokenizer, LANES)
            for workers in options.workers:
                for method in ("thread", "process") if workers else ("thread",):
                    compare(name, mixture, workers, method, options)
    assert threading.active_count() < 100


def compare(name: str, mixture: Mixture, workers: int, method: str, options: Any) -> None:
    """Print one line of the table."""
    ratios, busy = [], {"ours": [], "nodes": []}  # type: tuple[list[float], dict[str, list[float]]]
    for _ in range(options.rounds):
        ours = measure(lambda: OurStream(mixture, workers), options.tokens)
        nodes = measure(lambda: NodeStream(mixture, workers, method), options.tokens)
        assert ours[2] == nodes[2], "the samples differ"
        ratios.append(nodes[0] / ours[0])
        busy["ours"].append(ours[1])
        busy["nodes"].append(nodes[1])
    own, theirs = (statistics.median(busy[which]) for which in ("ours", "nodes"))
    print(
        f"{name:6} {workers:7}  {method:8} {statistics.median(ratios):9.2f}"
        f"   {min(ratios):.2f}-{max(ratios):.2f}   ours {own:.2f}, nodes {theirs:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
