"""Rows of pipelines whose ends are one matrix: each end stage trains a copy of it.

`table.py` has them among its own, so they cannot be made with what it has.
"""

from dataclasses import replace
from typing import Any

from tests.distributed.tiny import Case

_FULL = {"activation_checkpoint": {"mode": "full"}}
_COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}
_PAIRS = {"parallelism": {"pipeline_parallel_microbatch_size": 2}}
_ON_HOST = {
    "training": {"enable_cpu_offload": True},
    "activation_checkpoint": {"offload": True},
}
_ENDS_APART = {
    "parallelism": {
        "module_fqns_per_model_part": [
            ["tok_embeddings"],
            ["layers.0", "layers.1"],
            ["norm"],
            ["output"],
        ]
    }
}


def _optimizer(name: str, **args: Any) -> dict[str, dict[str, Any]]:
    return {"optimizer": {"name": name, "args": args}}


def _frozen(**settings: list[str]) -> dict[str, dict[str, Any]]:
    return {"model": {"handlers": ["freeze"]}, "handlers": {"freeze": settings}}


def _tied(*rows: Case) -> list[Case]:
    return [replace(row, tied=True, shard=max(1, row.shard)) for row in rows]


TIED_PIPELINES = [
    *_tied(
        Case(2, pp=2, schedule="GPipe"),
        Case(2, pp=2, microbatches=2, document_mask=True, settings=_FULL),
        Case(4, pp=4, layers=4),
        Case(2, pp=2, layers=4, schedule="Interleaved1F1B", document_mask=True),
        Case(2, pp=2, layers=4, schedule="LoopedBFS", settings=_COMPILED),
        Case(2, pp=2, layers=4, schedule="InterleavedZeroBubble"),
        Case(2, pp=2, layers=4, schedule="ZBVZeroBubble", document_mask=True),
        Case(2, pp=2, layers=4, schedule="DualPipeV"),
        Case(2, pp=2, schedule="ZBVZeroBubble", settings=_ENDS_APART),
        Case(4, shard=2, pp=2),
        Case(8, shard=4, pp=2, layers=4, schedule="InterleavedZeroBubble", document_mask=True),
        Case(4, replicate=2, pp=2, schedule="GPipe", microbatches=2),
        Case(8, replicate=2, shard=2, pp=2, layers=4, schedule="ZBVZeroBubble"),
        Case(4, shard=2, pp=2, document_mask=True, settings=_ON_HOST),
        Case(4, tp=2, pp=2, settings=_PAIRS),
        Case(
            4,
            tp=2,
            pp=2,
            layers=4,
            schedule="ZBVZeroBubble",
            document_mask=True,
            settings=_PAIRS,
        ),
        Case(8, shard=2, tp=2, pp=2, layers=4, schedule="Interleaved1F1B"),
        Case(4, cp=2, pp=2, document_mask=True),
        Case(8, cp=2, tp=2, pp=2, settings=_COMPILED | _FULL | _PAIRS),
        Case(4, shard=2, pp=2, settings=_optimizer("Muon")),
        Case(4, tp=2, pp=2, settings=_optimizer("Adafactor") | _PAIRS),
        Case(4, shard=2, pp=2, settings=_optimizer("AdamWBF16")),
        Case(4, replicate=2, pp=2, settings=_optimizer("AdamW8bit", block_size=16)),
        Case(2, pp=2, settings=_frozen(patterns=["tok_embeddings.*", "layers.0.*"])),
        Case(4, shard=2, pp=2, settings=_frozen(only=["output.*"])),
    ),
    replace(
        Case(4, shard=2, pp=2, layers=4, schedule="Interleaved1F1B", document_mask=True),
        family="tied naively",
    ),
]
