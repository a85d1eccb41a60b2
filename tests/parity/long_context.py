"""Rows of a model whose RoPE is stretched by YaRN, which also lengthens queries and keys.

`table.py` has them among its own, so they cannot be made with what it has.
"""

from typing import Any

from tests.distributed.tiny import Case

YARN = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_max_seq_len": 16,
    "rope_theta": 10.0,
    "rope_beta_fast": 2.0,
    "rope_beta_slow": 0.5,
}
"""One of the two pairs of channels is stretched, in part. Queries and keys are 1.14 times as
long."""

_FULL = {"activation_checkpoint": {"mode": "full"}}
_BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
_COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}


def _spread(method: str, balancer: str = "headtail") -> dict[str, dict[str, Any]]:
    return {
        "parallelism": {
            "context_parallel_method": method,
            "context_parallel_load_balancer": balancer,
        }
    }


def _row(world_size: int, *settings: dict[str, dict[str, Any]], **case: Any) -> Case:
    sections = {name: values for part in settings for name, values in part.items()}
    return Case(world_size, args=YARN, settings=sections, **{"shard": 1, **case})


LONG_CONTEXT = [
    _row(2, _FULL, shard=2, microbatches=2, document_mask=True),
    _row(2, _BY_OPERATOR, tp=2),
    _row(2, _spread("ring"), cp=2, document_mask=True),
    _row(2, _spread("ulysses", "none"), _COMPILED, cp=2),
    _row(2, pp=2, schedule="1F1B", microbatches=2, document_mask=True),
    _row(8, _spread("allgather"), _FULL, shard=2, cp=2, tp=2, tied=True),
]
