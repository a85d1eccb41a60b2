"""Rows of frozen models with low-rank adapters, and what these compute, written out.

`table.py` has them among its own, so they cannot be made with what it has. `lora_b` does not start
at zero there (`tests/distributed/tiny.py`): else A would have no gradient at first.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.tiny import LORA_B, Case, Result
from torchtitan.handlers.quantised import NF4
from torchtitan.models.spec import InitRule
from torchtitan.parallel.initialize import initialize_tensors

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 3, "alpha": 6.0},
    "DoRA": {"rank": 4, "alpha": 3.0, "dora": True, "rslora": True},
    "LoRA with dropout": {"rank": 3, "alpha": 6.0, "dropout": 0.25},
    "DoRA with dropout": {"rank": 3, "alpha": 6.0, "dora": True, "dropout": 0.25},
}
"""Settings of `lora`, by a name of few words."""
QUANTISED: dict[str, dict[str, Any]] = {
    "QLoRA": {"rank": 3, "alpha": 6.0},
    "QLoRA of 8 bits with DoRA": {"rank": 4, "alpha": 3.0, "dora": True, "bits": 8},
    "QLoRA with dropout": {"rank": 3, "alpha": 6.0, "dropout": 0.25},
}
"""The same of `qlora`."""
BASES = ("weight", "weight_nf4", "weight_int8", "weight_scale")


def _case(kind: str, *sections: dict[str, dict[str, Any]], **more: Any) -> Case:
    handler = "qlora" if kind in QUANTISED else "lora"
    settings: dict[str, dict[str, Any]] = {"model": {"handlers": [handler]}}
    settings["handlers"] = {handler: {**KINDS, **QUANTISED}[kind]}
    if handler == "qlora":  # blocks of 64 inputs
        more = {"args": {"dim": 128, "ffn_dim": 256}, **more}
    for part in sections:
        for name, values in part.items():
            settings[name] = {**settings.get(name, {}), **values}
    if "compile" in settings["handlers"]:
        settings["model"] = {"handlers": [handler, "compile"]}
    case = Case(shard=1, settings=settings)
    case = replace(case, **more)
    return replace(case, world_size=case.replicate * case.shard * case.cp * case.tp * case.pp)


_FULL = {"activation_checkpoint": {"mode": "full"}}
_BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
_EVERY_SECOND = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
_COMPILED = {"handlers": {"compile": {"backend": "aot_eager"}}}
_WEIGHTS_ON_HOST = {"training": {"enable_cpu_offload": True}}
_ON_HOST = {"activation_checkpoint": {"offload": True}}
_PAIRS = {"parallelism": {"pipeline_parallel_microbatch_size": 2}}
_RING = {"parallelism": {"context_parallel_method": "ring"}}
_ULYSSES = {
    "parallelism": {
        "context_parallel_method": "ulysses",
        "context_parallel_load_balancer": "none",
    }
}
_MUON = {"optimizer": {"name": "Muon"}}
_PACKED, _TIED = {"document_mask": True}, {"tied": True}

ADAPTED = [
    _case("DoRA with dropout", _FULL, microbatches=4),
    _case("LoRA", shard=2, microbatches=2, **_TIED),
    _case("DoRA with dropout", _COMPILED, _FULL, shard=2, **_PACKED),
    _case("DoRA", _BY_OPERATOR, replicate=2, **_PACKED),
    _case("DoRA with dropout", _EVERY_SECOND, replicate=2, shard=2, microbatches=2),
    _case("LoRA", tp=2),
    _case("DoRA with dropout", tp=4, kv_heads=2, microbatches=2),
    _case("DoRA", shard=2, tp=2, **_TIED),
    _case("LoRA with dropout", _COMPILED, _BY_OPERATOR, tp=2),
    _case("DoRA with dropout", _WEIGHTS_ON_HOST, _ON_HOST, _FULL, shard=2, tp=2, **_PACKED),
    _case("DoRA with dropout", _RING, _FULL, shard=2, cp=2, **_PACKED),
    _case("LoRA with dropout", _ULYSSES, cp=2, tp=2),
    _case("DoRA with dropout", _FULL, pp=2, schedule="1F1B", **_PACKED),
    _case("LoRA", shard=2, pp=2, schedule="Interleaved1F1B", layers=4),
    _case("DoRA with dropout", _PAIRS, _BY_OPERATOR, tp=2, pp=2, layers=4, schedule="GPipe"),
    _case("LoRA with dropout", _PAIRS, _RING, cp=2, pp=2, schedule="1F1B", **_PACKED),
    _case("LoRA", _MUON, replicate=2, tp=2),
    _case("QLoRA", _FULL, microbatches=2),
    _case("QLoRA", _BY_OPERATOR, shard=2, **_TIED),
    _case("QLoRA of 8 bits with DoRA", tp=2),
    _case("QLoRA with dropout", _COMPILED, _FULL, shard=2),
    _case("QLoRA", _WEIGHTS_ON_HOST, shard=2, tp=2),
    _case("QLoRA with dropout", _RING, cp=2, **_PACKED),
    _case("QLoRA of 8 bits with DoRA", _FULL, pp=2, schedule="1F1B"),
    _case("QLoRA", replicate=2, tp=2, kv_heads=1),
    _case("LoRA", _COMPILED, _FULL, replicate=2, microbatches=2),
    _case("LoRA with dropout", _ON_HOST, _FULL, replicate=2, microbatches=2),
    _case("LoRA with dropout", _WEIGHTS_ON_HOST, replicate=2, shard=2),
    _case("LoRA", _COMPILED, _ON_HOST, _FULL, replicate=2, shard=2, microbatches=2),
    _case("LoRA", _RING, _ON_HOST, _FULL, cp=2, microbatches=2),
    _case("LoRA", _COMPILED, _WEIGHTS_ON_HOST, _BY_OPERATOR, shard=2, cp=2),
    _case("DoRA", _COMPILED, _WEIGHTS_ON_HOST, pp=2, schedule="1F1B", microbatches=2),
    _case("LoRA", _PAIRS, _ON_HOST, _FULL, tp=2, pp=2, layers=4, schedule="Interleaved1F1B"),
    _case("QLoRA", _ON_HOST, _FULL, replicate=2, microbatches=2),
    _case("QLoRA with dropout", _COMPILED, replicate=2, shard=2, microbatches=2),
    _case("QLoRA", _COMPILED, _BY_OPERATOR, shard=2, cp=2),
    _case("QLoRA with dropout", _ULYSSES, cp=2, tp=2),
    _case("QLoRA of 8 bits with DoRA", _COMPILED, shard=2, pp=2, schedule="1F1B"),
    _case("QLoRA", _PAIRS, _WEIGHTS_ON_HOST, _FULL, tp=2, pp=2, schedule="GPipe"),
    _case("QLoRA with dropout", _PAIRS, _RING, cp=2, pp=2, schedule="1F1B", **_PACKED),
    _case("DoRA with dropout", _FULL, shard=2, cp=2, tp=2),
    _case("LoRA with dropout", replicate=2, shard=2, tp=2, microbatches=2),
    _case("QLoRA", _PAIRS, shard=2, tp=2, pp=2, schedule="1F1B"),
]


def kind_of(case: Case) -> str | None:
    """Return the name of a row's adapters; None without any."""
    tables = case.settings.get("handlers", {})
    for handler, kinds in (("lora", KINDS), ("qlora", QUANTISED)):
        for name, known in kinds.items():
            if tables.get(handler) == known:
                return name
    return None


def kept_handlers(case: Case) -> dict[str, Any]:
    """Return the settings by which a reference has the same model."""
    tables = case.settings.get("handlers", {})
    kept = {name: tables[name] for name in ("freeze", "lora", "qlora") if name in tables}
    return {"model": {"handlers": [*kept]}, "handlers": kept} if kept else {}


class _Written(nn.Linear):
    """The adapted matrix, formed and used as such."""

    scale: float

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.weight + self.scale * self.lora_b @ self.lora_a
        if self.magnitude is not None:
            matrix = matrix * (self.magnitude / matrix.detach().norm(dim=1)).unsqueeze(1)
        return F.linear(input, matrix)


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of the levels times the largest of a block of 64."""
    blocks = weight.float().unflatten(1, (-1, 64))
    scale = blocks.abs().amax(2, keepdim=True)
    levels = torch.tensor(NF4) if bits == 4 else torch.arange(-127, 128) / 127
    nearest = ((blocks / scale).unsqueeze(3) - levels).abs().argmin(3)
    values = levels.double() if bits == 4 else torch.arange(-127, 128).double() / 127
    return (values[nearest] * scale.double()).flatten(1)


def write_out(model: Any, seed: int, settings: dict[str, Any], quantised: bool = False) -> None:
    """Adapt a whole model on one device; frozen but for the adapters."""
    model.requires_grad_(False)
    rank = settings["rank"]
    linears = [
        (f"{prefix}.{name}", linear)
        for prefix, block in model.blocks().items()
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    for name, linear in linears:
        linear.__class__ = _Written
        linear.scale = settings["alpha"] / rank ** (0.5 if settings.get("rslora") else 1)
        a, b = torch.empty(rank, linear.in_features), torch.empty(linear.out_features, rank)
        linear.lora_a, linear.lora_b = (nn.Parameter(value.double()) for value in (a, b))
        std = (3 * linear.in_features) ** -0.5
        rules = {f"{name}.lora_a": InitRule("normal", std=std), f"{name}.lora_b": LORA_B}
        own = linear.named_parameters(prefix=name)
        initialize_tensors([pair for pair in own if pair[0] in rules], rules.__getitem__, seed)
        if quantised:
            linear.weight.data = _rounded(linear.weight.data, settings.get("bits", 4))
        linear.magnitude = None
        if settings.get("dora"):
            linear.magnitude = nn.Parameter(linear.weight.norm(dim=1))


def without_dropout(cases: list[Case]) -> Iterator[Case]:
    """Yield the cases whose adapters drop nothing."""
    yield from (case for case in cases if "dropout" not in (kind_of(case) or ""))


def without_bases(result: Result) -> Result:
    """Return the result without matrices, in whatever form."""
    kept = {n: p for n, p in result.parameters.items() if n.rpartition(".")[2] not in BASES}
    return replace(result, parameters=kept)
