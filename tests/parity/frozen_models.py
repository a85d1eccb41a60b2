"""Rows of losses that compare with a frozen model, such as DPO's reference.

`table.py` has them among its own, so they cannot be made with what it has.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.distributed.tiny import Case
from torchtitan.loss.registry import CrossEntropySettings, DistillationSettings, DPOSettings

_FULL = {"activation_checkpoint": {"mode": "full"}}
_BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
_COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}
_FROZEN = {
    "model": {"handlers": ["freeze"]},
    "handlers": {"freeze": {"patterns": ["tok_embeddings.*", "layers.0.*"]}},
}
_ON_HOST = {"training": {"enable_cpu_offload": True}}
_PAIRS = {"pipeline_parallel_microbatch_size": 2}
_ULYSSES = {"context_parallel_method": "ulysses", "context_parallel_load_balancer": "none"}
_RING = {"context_parallel_method": "ring"}
_ALLGATHER = {"context_parallel_method": "allgather"}


TEACHER = Path(__file__).parents[1] / "assets" / "teacher"
"""A Qwen3 with the vocabulary of the table's models, of random weights."""


def _rows(args: dict[str, Any], *rows: Case) -> list[Case]:
    """Give each row the loss, and documents that do not see each other."""
    loss = {"loss": {"name": "distillation" if "teacher_path" in args else "dpo", "args": args}}
    return [
        replace(row, settings=row.settings | loss, shard=max(1, row.shard), document_mask=True)
        for row in rows
    ]


def _mesh(**values: Any) -> dict[str, dict[str, Any]]:
    return {"parallelism": values}


FROZEN_MODELS = [
    *_rows(
        {"beta": 0.5},
        Case(1, microbatches=2, settings=_FULL),
        Case(2, shard=2, tied=True, settings=_COMPILED),
        Case(4, replicate=2, shard=2, microbatches=2, settings=_ON_HOST),
        Case(2, tp=2),
        Case(4, shard=2, cp=2, settings=_mesh(**_RING)),
        Case(4, cp=2, tp=2, microbatches=2, settings=_mesh(**_ULYSSES) | _COMPILED),
        Case(4, tp=2, pp=2, schedule="InterleavedZeroBubble", layers=4, settings=_mesh(**_PAIRS)),
        Case(4, shard=2, pp=2, tied=True),
        Case(8, shard=2, cp=2, tp=2, settings=_mesh(**_RING)),
    ),
    *_rows(
        {"beta": 2.0, "label_smoothing": 0.1},
        Case(4, tp=4, kv_heads=2, loss_chunks=1),
    ),
    *_rows(
        {"beta": 0.5, "reference_cache": "replaced"},
        Case(4, shard=2, cp=2, microbatches=2, settings=_mesh(**_RING)),
        Case(4, tp=2, pp=2, settings=_mesh(**_PAIRS)),
    ),
    *_rows(
        {"beta": 1.0, "variant": "robust", "label_smoothing": 0.1},
        Case(4, replicate=2, pp=2, schedule="GPipe", microbatches=2),
    ),
    *_rows(
        {"beta": 0.5, "variant": "ipo"},
        Case(4, cp=2, tp=2, settings=_mesh(**_ALLGATHER)),
        Case(4, shard=2, pp=2, settings=_FROZEN),
    ),
    *_rows(
        {"beta": 4.0, "variant": "simpo", "margin": 4.0},
        Case(4, cp=2, pp=2, settings=_mesh(**_RING, **_PAIRS)),
        Case(4, shard=2, tp=2, tied=True, settings=_BY_OPERATOR),
    ),
    *_rows(
        {"teacher_path": str(TEACHER), "weight": 0.7, "temperature": 2.0},
        Case(1, microbatches=2, settings=_FULL),
        Case(2, shard=2, microbatches=2, settings=_COMPILED),
        Case(4, replicate=2, shard=2, tied=True, settings=_ON_HOST),
        Case(4, shard=2, tp=2, settings=_BY_OPERATOR),
        Case(4, cp=2, tp=2, settings=_mesh(**_RING)),
        Case(4, tp=2, pp=2, schedule="InterleavedZeroBubble", layers=4, settings=_mesh(**_PAIRS)),
        Case(8, shard=2, cp=2, pp=2, settings=_mesh(**_ULYSSES)),
    ),
    *_rows(
        {"teacher_path": str(TEACHER), "weight": 0.8, "top_k": 7},
        Case(2, tp=2, microbatches=2, loss_chunks=1),
        Case(4, shard=2, cp=2, settings=_mesh(**_ALLGATHER)),
        Case(4, shard=2, pp=2),
    ),
]


def in_each_step(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings with a reference that is computed in each step, not in advance."""
    args = settings.get("loss", {}).get("args", {})
    if "reference_cache" not in args:
        return settings
    kept = {key: value for key, value in args.items() if key != "reference_cache"}
    return settings | {"loss": settings["loss"] | {"args": kept}}


def words_of(
    settings: DPOSettings | DistillationSettings | CrossEntropySettings,
) -> Iterator[str]:
    """Yield a loss's settings in words; nothing for the plain cross entropy."""
    if isinstance(settings, DistillationSettings):
        yield f"teacher's top {settings.top_k}" if settings.top_k else "teacher"
        return
    if isinstance(settings, DPOSettings):
        kind = {"robust": "robust DPO", "ipo": "IPO", "simpo": "SimPO"}
        plain = "conservative DPO" if settings.label_smoothing else "DPO"
        yield kind.get(settings.variant, plain)
        if settings.reference_cache:
            yield "reference in advance"
        return
    if settings.z_loss_weight:
        yield "z-loss"
    if settings.label_smoothing:
        yield "label smoothing"
