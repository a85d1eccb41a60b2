"""A rehearsal in words and numbers."""

import torch

from torchtitan.commands.dry_run.dry_run import Rehearsal
from torchtitan.config.run_context import RunContext
from torchtitan.utils.device import GIB, memory_peak

_MIB = 2**20


def report(rehearsal: Rehearsal, context: RunContext) -> str:
    """What the rank holds and exchanges, a subject a line."""
    model = context.config.model
    share = rehearsal.num_parameters / rehearsal.total_parameters
    peak = memory_peak(torch.device("cpu")).reserved_gib
    lines = [
        ("rehearsal", f"a step of {model.name} {model.flavor} runs on rank {rehearsal.rank}"),
        ("processes", f"{context.world_size}: {rehearsal.dims.describe()}"),
        ("rank", _coordinate(rehearsal)),
        *(("holds", f"{part}: {_listed(names)}") for part, names in rehearsal.parts.items()),
        ("vocabulary", f"{rehearsal.vocab_size}"),
        (
            "parameters",
            f"{rehearsal.num_parameters:,} of {rehearsal.total_parameters:,} ({share:.3%})",
        ),
        ("memory", _memory(rehearsal)),
        ("step", f"{context.describe_batch()}, of which {rehearsal.num_microbatches} ran"),
        *(("traffic", line) for line in _traffic(rehearsal)),
        ("took", f"{rehearsal.seconds:.1f} s and {peak:.2f} GiB on this machine"),
    ]
    if "compile" in model.handlers:
        lines.append(("compile", "blocks were traced (aot_eager), no code was generated"))
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _coordinate(rehearsal: Rehearsal) -> str:
    degrees = rehearsal.dims
    at = [f"{axis} {n}" for axis, n in rehearsal.coordinate.items() if getattr(degrees, axis) > 1]
    return f"{rehearsal.rank}: {', '.join(at) or 'the only one'}"


def _listed(names: list[str]) -> str:
    """The first and last of many."""
    shown = names if len(names) <= 5 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)


def _memory(rehearsal: Rehearsal) -> str:
    sizes = {
        "parameters": rehearsal.parameter_bytes,
        "gradients": rehearsal.gradient_bytes,
        "optimizer": rehearsal.optimizer_bytes,
    }
    terms = " + ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    more = "activations"
    if rehearsal.accumulated_bytes:
        more += f", and {_size(rehearsal.accumulated_bytes)} of gradients not yet reduced"
    return f"{terms} = {_size(sum(sizes.values()))}; besides {more}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / _MIB:.2f} MiB"


def _traffic(rehearsal: Rehearsal) -> list[str]:
    """A line for each kind of collective along each axis."""
    traffic = rehearsal.traffic
    width = max(len(axes) for axes, _ in [("along", ""), *traffic.calls])
    lines = [f"{'along':<{width}}  {'collective':<14} {'calls':>6} {'MiB':>12}"]
    for (axes, collective), calls in sorted(traffic.calls.items()):
        size = traffic.num_bytes[axes, collective] / _MIB
        lines.append(f"{axes:<{width}}  {collective:<14} {calls:>6} {size:>12,.1f}")
    lines += [f"and that of {name}, which depends on the data" for name in sorted(traffic.unknown)]
    return lines
