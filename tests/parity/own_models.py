"""Rows of families that share parameters, have biases, adapters or dropout
(`tests/distributed/own_models.py`).

`table.py` has them among its own, so they cannot be made with what it has.
"""

from dataclasses import replace

from tests.distributed.tiny import NUM_SEQUENCES, Case

DRAWS = "dropping"
"""The family whose forward draws random numbers."""

_FULL = {"activation_checkpoint": {"mode": "full"}}
_BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
_EVERY_SECOND = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
_COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}
_PAIRS = {"parallelism": {"pipeline_parallel_microbatch_size": 2}}
_ON_HOST = {"activation_checkpoint": {"offload": True}}


def _rows(family: str, *rows: Case) -> list[Case]:
    return [replace(row, family=family, shard=max(1, row.shard)) for row in rows]


OWN_MODELS = [
    *_rows(
        "tied naively",
        Case(2, shard=2),
        Case(2, replicate=2, microbatches=2),
        Case(2, tp=2, settings=_FULL),
        Case(2, cp=2, document_mask=True),
    ),
    *_rows(
        "shared by blocks",
        Case(2, shard=2, microbatches=2, settings=_COMPILED | _FULL),
        Case(2, replicate=2, document_mask=True),
        Case(4, replicate=2, shard=2, settings=_BY_OPERATOR),
        Case(2, tp=2, settings=_COMPILED),
        Case(4, cp=2, tp=2),
        Case(2, pp=2, layers=4),
        Case(4, tp=2, pp=2, layers=4, schedule="GPipe", settings=_PAIRS | _FULL),
    ),
    *_rows(
        "one block",
        Case(2, shard=2, settings=_ON_HOST),
        Case(2, tp=2),
    ),
    *_rows(
        "biased",
        Case(2, tp=2, microbatches=2),
        Case(4, tp=4, kv_heads=2, settings=_BY_OPERATOR),
        Case(4, shard=2, tp=2, settings=_COMPILED | _FULL),
        Case(4, cp=2, tp=2),
        Case(4, tp=2, pp=2, layers=4, schedule="ZBVZeroBubble", settings=_PAIRS),
    ),
    *_rows(
        "low rank",
        Case(2, shard=2, microbatches=2, document_mask=True),
        Case(2, tp=2, settings=_FULL),
        Case(4, tp=4, kv_heads=2, microbatches=2),
        Case(4, shard=2, tp=2, settings=_COMPILED | _BY_OPERATOR),
        Case(4, cp=2, tp=2),
        Case(4, tp=2, pp=2, layers=4, schedule="Interleaved1F1B", settings=_PAIRS | _FULL),
    ),
    *_rows(
        DRAWS,  # microbatches of one sequence, as the one process has them
        Case(1, microbatches=8, settings=_FULL),
        Case(2, shard=2, microbatches=4, settings=_BY_OPERATOR),
        Case(2, replicate=2, microbatches=4, settings=_EVERY_SECOND),
        Case(4, replicate=2, shard=2, microbatches=2, document_mask=True),
        Case(2, pp=2),
        Case(2, pp=2, layers=4, schedule="Interleaved1F1B", settings=_FULL),
        Case(4, shard=2, pp=2, layers=4, schedule="ZBVZeroBubble"),
    ),
]


def reference_microbatches(case: Case) -> int:
    """Return how many batches one process adds up: what is drawn depends on their size."""
    return NUM_SEQUENCES if case.family == DRAWS else 1
