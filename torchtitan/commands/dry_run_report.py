"""The report of a dry run, as text."""

import torch

from torchtitan.commands.dry_run import DryRun
from torchtitan.config.run_context import RunContext
from torchtitan.utils.device import memory_peak
from torchtitan.utils.text import format_bytes

_MIB = 2**20


def report(result: DryRun, context: RunContext) -> str:
    """Return the lines to print: what the rank holds and exchanges."""
    model = context.config.model
    held, total = result.num_parameters, result.total_parameters
    trained = result.trained_parameters
    peak = memory_peak(torch.device("cpu")).reserved_gib
    lines = [
        ("dry run", f"a step of {model.name} {model.flavor} runs on rank {result.rank}"),
        ("processes", f"{context.world_size}: {result.dims.describe()}"),
        ("rank", _coordinate(result)),
        *(("holds", f"{part}: {_listed(names)}") for part, names in result.parts.items()),
        ("vocabulary", f"{result.vocab_size}"),
        ("parameters", f"{held:,} of {total:,} ({held / total:.3%}) on this rank"),
        ("trained", f"{trained:,} of {total:,} ({trained / total:.3%})"),
        ("memory", _memory(result)),
        ("step", f"{context.describe_batch()}, of which {result.num_microbatches} ran"),
        *(("traffic", line) for line in _traffic(result)),
        ("took", f"{result.seconds:.1f} s and {peak:.2f} GiB on this machine"),
    ]
    if "compile" in model.handlers:
        lines.append(("compile", "blocks were traced (aot_eager), no code was generated"))
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _coordinate(result: DryRun) -> str:
    degrees = result.dims
    at = [f"{axis} {n}" for axis, n in result.coordinate.items() if getattr(degrees, axis) > 1]
    return f"{result.rank}: {', '.join(at) or 'the only one'}"


def _listed(names: list[str]) -> str:
    """Shorten a long list to its ends."""
    shown = names if len(names) <= 5 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)


def _memory(result: DryRun) -> str:
    sizes = {
        "parameters": result.parameter_bytes,
        "gradients": result.gradient_bytes,
        "optimizer": result.optimizer_bytes,
    }
    if result.frozen_bytes:
        sizes["frozen model"] = result.frozen_bytes
    terms = " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    more = "activations"
    if result.accumulated_bytes:
        more += f", and {format_bytes(result.accumulated_bytes)} of gradients not yet reduced"
    return f"{terms} = {format_bytes(sum(sizes.values()))}; besides {more}"


def _traffic(result: DryRun) -> list[str]:
    """Return a line for each kind of collective along each axis."""
    traffic = result.traffic
    width = max(len(axes) for axes, _ in [("along", ""), *traffic.calls])
    lines = [f"{'along':<{width}}  {'collective':<14} {'calls':>6} {'MiB':>12}"]
    for (axes, collective), calls in sorted(traffic.calls.items()):
        size = traffic.num_bytes[axes, collective] / _MIB
        lines.append(f"{axes:<{width}}  {collective:<14} {calls:>6} {size:>12,.1f}")
    lines += [f"and that of {name}, which depends on the data" for name in sorted(traffic.unknown)]
    return lines
