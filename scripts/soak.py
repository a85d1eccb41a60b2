"""Kill runs at random times until enough kills are survived, and compare them with quiet runs.

A tiny model trains on one or two ranks and saves at every step or two. Ranks are killed, stopped
and asked to stop at random times, and at each phase of a start, a save and a deletion; the same
command goes on. Every other run changes its mesh at each start. Whenever the processes are gone the
folder is checked. At the end of a run its weights, losses and ledger are compared with those of a
run that nothing happened to: to the bit where the mesh stayed, else within 1e-9 in float64.

    python scripts/soak.py --kills 200
    python scripts/soak.py --kills 8 --seed 3 --minutes 5 --folder outputs/soak

Exit status 1 if anything was wrong; then the folders are kept.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults.soaking import Figures, Soaked
from tests.faults.starting import MESHES
from torchtitan.checkpoint.dcp_io import quiet_dcp

TOLERANCE = 1e-9
TWO_RANKS = [mesh for mesh, (count, _) in MESHES.items() if count == 2]


def soak(place: Path, kills: int, seed: int, seconds: float, steps: int = 40) -> Figures:
    """Kill runs of so many steps, in folders below `place`, so many times, or for so long."""
    quiet_dcp()
    dice, figures, quiet = random.Random(seed), Figures(), {}
    started, number = time.monotonic(), 0

    def goes_on() -> bool:
        done = figures.kills.total()
        return done < kills and time.monotonic() - started < seconds and not figures.faults

    while goes_on():
        stays = number % 2 == 0
        meshes = [dice.choice(TWO_RANKS)] if stays else list(MESHES)
        mesh, dtype = (meshes[0], "float32") if stays else ("dp 1", "float64")
        if (mesh, dtype) not in quiet:
            folder = place / f"quiet-{mesh}-{dtype}"
            reference = Soaked(folder, steps, [mesh], dtype, dice, figures)
            reference.finish(mesh)
            quiet[mesh, dtype] = reference
        run = Soaked(place / f"run-{number}", steps, meshes, dtype, dice, figures)
        while goes_on() and not run.is_over:
            line = run.kill_once()
            print(f"{figures.kills.total():4} kills, run {number}, {line}", flush=True)
        run.finish(mesh)
        run.compare_with(quiet[mesh, dtype], 0.0 if stays else TOLERANCE)
        figures.runs += 1
        number += 1
        if not figures.faults:
            shutil.rmtree(run.folder.parent)
    return figures


def describe(figures: Figures, seconds: float) -> str:
    """Return the figures in lines."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures.kills.most_common())
    lines = [
        f"{figures.kills.total()} kills of {figures.runs} runs in {seconds:.0f} s: {kinds}",
        f"{figures.commits} reported commits, {figures.compared} steps on disk compared,"
        f" {len(figures.faults)} faults",
        f"steps to repeat: {statistics.mean(figures.repeated or [0]):.2f} a kill, at most"
        f" {max(figures.repeated, default=0)}",
    ]
    for what, times in (
        ("a rank whose peer was killed ended after", figures.lonely_seconds),
        ("all ranks had saved and ended, once asked to stop, after", figures.stop_seconds),
    ):
        if times:
            middle, worst = statistics.median(times), max(times)
            lines.append(f"{what} {middle:.2f} s (median of {len(times)}), at most {worst:.2f} s")
    return "\n".join([*lines, *figures.faults])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--folder", type=Path, help="for the runs; a temporary one without")
    options = parser.parse_args(words)
    place = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    started = time.monotonic()
    figures = soak(place, options.kills, options.seed, 60 * options.minutes)
    print(describe(figures, time.monotonic() - started))
    if figures.faults:
        print(f"see {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
