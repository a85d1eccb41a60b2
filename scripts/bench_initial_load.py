"""Measure loading a Hugging Face folder on each rank: seconds, memory, bytes read.

    python scripts/bench_initial_load.py [--flavor 1B] [--ranks 1 2 4] [--mesh fsdp] [--shards 4]

Makes a folder of random bfloat16 weights with the sizes of a Llama 3, in FOLDER or for the time of
the measurement. Then as many processes as ranks load it at the same time, each its own share, into
bfloat16 parameters that have no values yet. Nothing is exchanged, so the process group is not real.
Memory is the process's largest resident size, mapped pages of the files included, less what it
had before and its parameters. A layer is printed for comparison.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--flavor", default="1B", help="of llama3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--mesh", choices=["fsdp", "tp"], default="fsdp")
    parser.add_argument("--shards", type=int, default=4, help="files of the folder")
    parser.add_argument("--folder", type=Path, help="made there if it does not exist, and kept")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options, *options.worker)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        options.folder = options.folder or Path(temporary) / "model"
        if not options.folder.exists():
            make_folder(options.folder, options.flavor, options.shards)
        print("mesh    seconds  share MiB  peak MiB above it  layer MiB  read MiB a rank  of MiB")
        for ranks in options.ranks:
            report(f"{options.mesh} {ranks}", run_workers(options, ranks))


def report(mesh: str, results: list[dict[str, float]]) -> None:
    """Print the largest of each figure over the ranks."""
    worst = {key: max(result[key] for result in results) for key in results[0]}
    print(
        f"{mesh:<6}  {worst['seconds']:>7.1f}  {worst['share']:>9.0f}  {worst['above']:>17.0f}"
        f"  {worst['layer']:>9.0f}  {worst['read']:>15.0f}  {worst['whole']:>6.0f}",
        flush=True,
    )


def run_workers(options: argparse.Namespace, ranks: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--flavor", options.flavor, "--mesh", options.mesh]
    command += ["--folder", str(options.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [*command, "--worker", str(rank), str(ranks)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def sized(flavor: str):
    """The family and its hyper-parameters."""
    from torchtitan.models.registry import get_family

    family = get_family("llama3")
    own = {} if family.flavors[flavor].vocab_size else {"vocab_size": 2048}
    return family, family.resolve_args(flavor, own)


def make_folder(folder: Path, flavor: str, shards: int, std: float = 0.02) -> None:
    """Write random weights, whole layers to a file, as Hugging Face's writer does."""
    import torch
    from safetensors.torch import save_file

    from torchtitan.models.hf_weights import hf_names

    family, args = sized(flavor)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in family.build(args).named_parameters()}
    rows = hf_names(shapes, family.hf_weights, args)
    total, files, done = sum(map(_numel, shapes.values())), [[] for _ in range(shards)], 0
    for name, shape in shapes.items():
        files[min(shards - 1, done * shards // total)].append(name)
        done += _numel(shape)
    weight_map = {}
    folder.mkdir(parents=True)
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {rows[n].theirs: torch.empty(shapes[n], dtype=torch.bfloat16) for n in names}
        for tensor in tensors.values():
            tensor.normal_(std=std)
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def measure(options: argparse.Namespace, rank: int, ranks: int) -> dict[str, float]:
    """Load the share of one rank, in this process."""
    import time

    import torch

    from torchtitan.checkpoint.state import model_tensors
    from torchtitan.config import JobConfig
    from torchtitan.distributed.context import fake_world
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.training import model_builder
    from torchtitan.utils.torch_compat import local_tensor
    from torchtitan.weights.source import open_weights

    torch.set_num_threads(1)
    family, args = sized(options.flavor)
    tensor_parallel = ranks if options.mesh == "tp" else 1
    config = JobConfig.model_validate(
        {
            "model": {"flavor": options.flavor},
            "training": {"dtype": "bfloat16"},
            "parallelism": {"tensor_parallel_degree": tensor_parallel},
        }
    )
    dims = ParallelDims.from_section(config.parallelism, ranks)
    with fake_world(rank, ranks):
        mesh = dims.build_mesh("cpu")
        cpu = torch.device("cpu")
        model = model_builder.build_model(config, args.vocab_size, mesh, dims, cpu, False)
        tensors = model_tensors(model.parts)
        local = [local_tensor(tensor) for tensor in tensors.values()]
        for tensor in local:
            tensor.zero_()  # memory counts once it is touched
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the largest size starts from here
        start = time.perf_counter()
        source = open_weights(options.folder, family, args)
        source.load(tensors)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "share": sum(tensor.nbytes for tensor in local) / MIB,
        "above": resident("VmHWM") - before,
        "layer": args.modules()["layers.0"] * 2 / MIB,
        "read": source.bytes_read / MIB,
        "whole": sum(f.stat().st_size for f in options.folder.glob("*.safetensors")) / MIB,
    }


def resident(kind: str) -> float:
    """MiB of memory of this process, now or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


if __name__ == "__main__":
    main()
