"""Write docs/reference/refusals.md, which models, handlers and meshes do not go together, from the
checks that every run makes:
python scripts/make_refusals.py"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.registry import BUILT_IN
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.registry import HANDLERS
from torchtitan.models.registry import MODELS
from torchtitan.preflight import ARITHMETIC, errors_of, preflight
from torchtitan.preflight import handlers as handlers_check

# The page does not depend on the packages that are installed here.
handlers_check.find_spec = lambda package: ModuleSpec(package, None)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "refusals.md"
DEGREES = (2, 4, 8, 16, 32)
SHARDS = 8
SEQUENCES = 64
"""Of a step, on each data rank: enough for the microbatches of every schedule."""


@dataclass(frozen=True)
class Mesh:
    """`kind` and `degree` are its name; all but those of data parallelism shard over `SHARDS`
    ranks beside."""

    kind: str
    degree: str
    parallelism: Mapping[str, Any]
    world_size: int


@dataclass(frozen=True)
class Variant:
    """A handler with settings that matter for what it goes with; without `handler`, none."""

    handler: str = ""
    words: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cuda"

    @property
    def title(self) -> str:
        return f"`{self.handler}`" + (f", {self.words}" if self.words else "")


_SENT = {"enable_fsdp_float8_all_gather": True}
# Of handlers whose settings, or device, decide. All others are tried as they are by default.
VARIANTS = {
    "freeze": [Variant("freeze", "", {"patterns": ["tok_embeddings.*"]})],
    "float8": [
        Variant("float8"),
        Variant("float8", "sent in float8", _SENT),
        Variant("float8", "rowwise", {"recipe_name": "rowwise"}),
        Variant("float8", "rowwise, sent in float8", {"recipe_name": "rowwise", **_SENT}),
        Variant("float8", "rowwise_with_gw_hp", {"recipe_name": "rowwise_with_gw_hp"}),
    ],
    "mxfp8": [
        Variant("mxfp8"),
        Variant("mxfp8", "on CPUs", device="cpu"),
        Variant("mxfp8", "emulated", {"recipe_name": "mxfp8_emulated"}),
    ],
}

Where = dict[str, list[Mesh]]
"""The meshes that are refused, by flavor."""


def meshes() -> Iterator[Mesh]:
    """Each axis by itself, in all its ways, and some together."""
    copies = {"data_parallel_replicate_degree": SHARDS, "data_parallel_shard_degree": 1}
    yield Mesh("FSDP", str(SHARDS), {}, SHARDS)
    yield Mesh("HSDP", f"2 x {SHARDS}", {"data_parallel_replicate_degree": 2}, 2 * SHARDS)
    yield Mesh("DDP", str(SHARDS), copies, SHARDS)
    for n in DEGREES:
        yield Mesh("tensor", str(n), {"tensor_parallel_degree": n}, n * SHARDS)
    for method in ("allgather", "ring", "ulysses"):
        for n in DEGREES:
            section = {"context_parallel_degree": n, "context_parallel_method": method}
            yield Mesh(f"context ({method})", str(n), section, n * SHARDS)
    for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"):
        for n in DEGREES[:-1]:
            section = {
                "pipeline_parallel_degree": n,
                "pipeline_parallel_schedule": schedule,
                "pipeline_parallel_microbatch_size": 1,
            }
            yield Mesh(f"pipeline ({schedule})", str(n), section, n * SHARDS)
    both = {"tensor_parallel_degree": 4, "context_parallel_degree": 4}
    ulysses = {**both, "context_parallel_method": "ulysses"}
    yield Mesh("tensor x context (ulysses)", "4 x 4", ulysses, 16 * SHARDS)
    whole = {**both, "pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 1}
    yield Mesh("tensor x context x pipeline", "4 x 4 x 2", whole, 32 * SHARDS)


def built_in() -> list[str]:
    """The library's own handlers; what packages add is not for its pages."""
    return [name for name in HANDLERS if HANDLERS.origin(name) == BUILT_IN]


def flavors() -> list[tuple[str, str]]:
    """Family and flavor."""
    own = [MODELS[name] for name in MODELS if MODELS.origin(name) == BUILT_IN]
    return [(family.name, flavor) for family in own for flavor in family.flavors]


def refusals(variant: Variant, family: str, flavor: str, mesh: Mesh) -> list[ConfigIssue]:
    """What the checks by arithmetic say; no model is built for it, and no torch imported."""
    data_ranks = SHARDS * mesh.parallelism.get("data_parallel_replicate_degree", 1)
    if mesh.kind == "DDP":
        data_ranks = SHARDS
    chosen = [variant.handler] if variant.handler else []
    config = JobConfig.model_validate(
        {
            "model": {"name": family, "flavor": flavor, "handlers": chosen},
            "handlers": {variant.handler: dict(variant.settings)} if variant.settings else {},
            "training": {
                "dataset": "stdlib",
                "seq_len": 4096,
                "local_batch_size": 1,
                "global_batch_size": SEQUENCES * data_ranks,
            },
            "activation_checkpoint": {"mode": "none"},
            "parallelism": dict(mesh.parallelism),
        }
    )
    context = RunContext(config, mesh.world_size, variant.device, full=False)
    return errors_of(preflight(context, [ARITHMETIC]))


def collect(variant: Variant) -> dict[tuple[str, str], Where]:
    """By key and rule, flavors and meshes."""
    found: dict[tuple[str, str], Where] = {}
    for family, flavor in flavors():
        for mesh in meshes():
            for problem in refusals(variant, family, flavor, mesh):
                where = found.setdefault((problem.key, problem.problem), {})
                where.setdefault(f"{family} {flavor}", []).append(mesh)
    return found


def rows(found: Mapping[tuple[str, str], Where]) -> list[tuple[str, str, str]]:
    """Flavors, meshes and rule. Rules that only differ in their numbers are one, shown by one of
    them; so are flavors that are refused the same meshes."""
    rules: dict[tuple[str, str], list[tuple[str, Where]]] = {}
    for (key, text), where in found.items():
        rules.setdefault((key, re.sub(r"\d+", "#", text)), []).append((text, where))
    made = []
    for (key, _), alike in rules.items():
        merged: dict[str, list[Mesh]] = {}
        for _, where in alike:
            for flavor, refused in where.items():
                merged.setdefault(flavor, []).extend(refused)
        by_meshes: dict[str, list[str]] = {}
        for flavor, refused in merged.items():
            by_meshes.setdefault(_meshes_in_words(refused), []).append(flavor)
        text = alike[0][0] + (" (or with other numbers)" if len(alike) > 1 else "")
        for number, (meshes_text, names) in enumerate(by_meshes.items()):
            rule = f"`{key}`: {text}" if number == 0 else "the same"
            made.append((_flavors_in_words(names), meshes_text, rule))
    return made


def _meshes_in_words(refused: list[Mesh]) -> str:
    everything = list(meshes())
    chosen = [mesh for mesh in everything if mesh in refused]
    if len(chosen) == len(everything):
        return "all"
    kinds: dict[str, list[str]] = {}
    for mesh in chosen:
        kinds.setdefault(mesh.kind, []).append(mesh.degree)
    return "; ".join(f"{kind} {', '.join(degrees)}" for kind, degrees in kinds.items())


def _flavors_in_words(names: list[str]) -> str:
    everything = [f"{family} {flavor}" for family, flavor in flavors()]
    if len(names) == len(everything):
        return "all"
    others = [name for name in everything if name not in names]
    if len(others) < len(names):
        return f"all but {', '.join(others)}"
    return ", ".join(name for name in everything if name in names)


def pairs() -> list[tuple[str, str]]:
    """Handlers that are refused together, or in this order; and the rule, without their names."""
    rules: dict[tuple[str, str], list[str]] = {}
    for first in built_in():
        for second in built_in():
            if first == second:
                continue
            settings = {
                name: dict(VARIANTS[name][0].settings)
                for name in (first, second)
                if name in VARIANTS
            }
            values = {"model": {"handlers": [first, second]}, "handlers": settings}
            context = RunContext(JobConfig.model_validate(values), 1, "cuda", full=False)
            for problem in errors_of(handlers_check.check_static(context)):
                if problem.key == "model.handlers" and problem.value in (first, second):
                    other = second if problem.value == first else first
                    rule = problem.problem.removesuffix(f" {other}")
                    others = rules.setdefault((str(problem.value), rule), [])
                    if other not in others:
                        others.append(other)
    return [
        (f"`{name}`", f"{rule} {', '.join(f'`{other}`' for other in others)}")
        for (name, rule), others in rules.items()
    ]


def page() -> str:
    """The page."""
    plain = collect(Variant())
    lines = [TEXT.format(shards=SHARDS, sequences=SEQUENCES), "## Models and meshes\n"]
    lines += _table(("models", "meshes", "rule"), rows(plain))
    lines += ["\n## Handlers, models and meshes\n", WITH_HANDLERS]
    with_handlers, free = [], []
    for name in built_in():
        for variant in VARIANTS.get(name, [Variant(name)]):
            found = {}
            for rule, where in collect(variant).items():
                more = {
                    flavor: [mesh for mesh in refused if mesh not in _of(plain, rule, flavor)]
                    for flavor, refused in where.items()
                }
                more = {flavor: refused for flavor, refused in more.items() if refused}
                if more:
                    found[rule] = more
            with_handlers += [(variant.title, *row) for row in rows(found)]
            free += [variant.title] * (not found)
    lines += _table(("handler", "models", "meshes", "rule"), with_handlers)
    lines += [f"\nRefused nowhere: {'; '.join(free)}.\n", BY_PARTS]
    lines += ["\n## Handlers and handlers\n", *_table(("handler", "rule"), pairs())]
    return "\n".join(lines) + "\n"


def _of(found: Mapping[tuple[str, str], Where], rule: tuple[str, str], flavor: str) -> list[Mesh]:
    return found.get(rule, {}).get(flavor, [])


def _table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


TEXT = """# What is refused

Made by `python scripts/make_refusals.py`, which asks the checks that every run makes before it
starts; a rule is what the check says. Each flavor was tried with each handler on each of these
meshes: FSDP, HSDP and DDP; tensor, context (by every method) and pipeline parallelism (by several
schedules) of 2 to 32 ranks, each with FSDP over {shards} ranks beside it; and some together.
Sequences had 4,096 tokens, each data rank {sequences} of them a step, without activation
checkpointing, on GPUs. What is not listed is not refused.

A rejected run prints what to write instead; `torchtitan train FILE --check` with
`WORLD_SIZE` set tells it beforehand. What the length of sequences, the batch, or other settings
rule out is in [parallelism](../guides/parallelism.md), [low precision](../guides/low_precision.md)
and [optimizers](../guides/optimizers.md).
"""
WITH_HANDLERS = """Beside what is refused to the model without a handler.
"""
BY_PARTS = """When the model is built, and so in a dry run (`--comm.mode fake_backend`), `float8`,
`mxfp8`, `int8` and `bitnet` also refuse a degree of tensor parallelism that leaves parts of
matrices which do not fit ([low precision](../guides/low_precision.md#on-every-mesh))."""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
