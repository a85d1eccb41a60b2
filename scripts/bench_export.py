"""Measure an export in each type: seconds, peak memory, KL divergence.

    python scripts/bench_export.py [--flavor 1B] [--std 0.02] [--format hf] [--dtypes ...]
    python scripts/bench_export.py --folder .cache/smollm2

Exports a Hugging Face folder, or one of random bfloat16 weights with the sizes of a Llama 3, in a
process for each type. Memory is the process's largest resident size, mapped pages of files
included, less what it had before. It is measured for writing, for reading the result back with
our model, and with --transformers for transformers, which holds the whole model in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench_initial_load import ROOT, make_folder, resident, sized

HEADER = "type       write s  MiB above   read s  MiB above  transformers s  MiB above   KL, nats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--flavor", default="1B", help="of llama3, for random weights")
    parser.add_argument("--std", type=float, default=0.02, help="of the random weights")
    parser.add_argument("--folder", type=Path, help="of a model, in place of random weights")
    parser.add_argument("--format", choices=["hf", "gguf"], default="hf")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        if options.folder is None:
            options.folder = Path(temporary) / "model"
            make(options)
        print(HEADER)
        for dtype in options.dtypes:
            report(dtype, run_worker(options, dtype))


def make(options: argparse.Namespace) -> None:
    """The folder of the benchmark of loading, with its config."""
    from torchtitan.weights.hf_config import to_hf_config

    make_folder(options.folder, options.flavor, shards=4, std=options.std)
    config = to_hf_config(*sized(options.flavor), "bfloat16")
    (options.folder / "config.json").write_text(json.dumps(config))


def run_worker(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", dtype, "--folder", str(options.folder)]
    command += ["--format", options.format] + ["--transformers"] * options.transformers
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit("the export failed")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(dtype: str, found: dict[str, float]) -> None:
    texts = [
        f"{found[f'{what} seconds']:>{width}.1f}  {found[f'{what} above']:>9.0f}"
        if f"{what} seconds" in found
        else f"{'-':>{width}}  {'-':>9}"
        for what, width in (("write", 7), ("read", 7), ("transformers", 14))
    ]
    print(f"{dtype:<9}  {'  '.join(texts)}  {found['kl']:>9.1g}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One export, in this process."""
    from functools import partial

    from torchtitan.training import export
    from torchtitan.training.open_model import open_model
    from torchtitan.weights import readback
    from torchtitan.weights.gguf_writer import gguf_dtype
    from torchtitan.weights.stored_model import target_dtype

    found: dict[str, float] = {}

    def timed(what, action):
        before, start = resident("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the largest size starts from here
        result = action()
        found[f"{what} seconds"] = time.perf_counter() - start
        found[f"{what} above"] = resident("VmHWM") - before
        return result

    model = open_model(options.folder)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        target = export.Target(Path(temporary) / "out", options.format, options.worker)
        write = export._write_hf if options.format == "hf" else export._write_gguf
        timed("write", lambda: write(model, target))

        def dtype_of(name):
            return target_dtype(model.weights.tensors[name], options.worker)

        if options.format == "gguf":
            dtype_of = partial(gguf_dtype, model, options.worker)
        readback._why_no_transformers = lambda _: "measured below"
        back = timed("read", lambda: readback.read_back(model, target.path, dtype_of))
        found["kl"] = back.ours
        if options.transformers and options.format == "hf":
            tokens = readback._probe(model.args)
            timed("transformers", lambda: readback._logits_of_transformers(target.path, tokens))
    return found


if __name__ == "__main__":
    main()
