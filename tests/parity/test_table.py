"""The promise: every mesh trains like one process.

Losses, gradient norms and the evaluated loss, every parameter and what the optimizer keeps of it
after the last step, all in float64, on every rank.
"""

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.adapted import kind_of, without_bases, without_dropout, write_out
from tests.parity.own_models import DRAWS
from tests.parity.plain_losses import plain_losses
from tests.parity.table import (
    TABLE,
    TOLERANCE,
    dims_of,
    kinds_of,
    name_of,
    reference_of,
    special_of,
)
from tests.pool import GlooPool
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.parallel_dims import AXES
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import initialize_parameters
from torchtitan.preflight import ARITHMETIC, errors_of, preflight

REFERENCES = list({name_of(reference_of(case)): reference_of(case) for case in TABLE}.values())
COMPACT = ("AdamWBF16", "AdamW8bit")
"""Optimizers that torch does not have; tests/unit/optim/test_optimizer_kinds.py has more."""


def met_by(case: Case) -> set[tuple[str, ...]]:
    """Return what a row has that should be met by day, in pairs; none if it takes too long."""
    kinds, special = sorted(kinds_of(case)), sorted(special_of(case))
    if "compiled inductor" in special or (kind_of(case) and case.world_size > 4):
        return set()  # a minute of a compiler; adapters have meshes of at most two axes
    if "compile" in case.config().handlers:
        axes = [name for name in AXES if getattr(dims_of(case), name) > 1]
        return {("compiled", *pair) for pair in combinations(axes, 2)} or {("compiled", *axes)}
    return {tuple(kinds), *product(kinds, special), *combinations(special, 2)}


def rows() -> Iterator[Any]:
    """Yield the rows mesh by mesh, for the night those whose pairs others meet on fewer ranks.

    By day there is every combination of parallelisms, and each pair of two special things, of one
    and a parallelism, and of two axes that are compiled.
    """
    left = Counter(pair for case in TABLE for pair in met_by(case))
    by_mesh: dict[str, dict[str, Any]] = {}
    for case in TABLE:  # in its order, whatever is left out first
        by_mesh.setdefault(dims_of(case).describe(), {})[name_of(case)] = None
    for case in sorted(TABLE, key=lambda case: case.world_size)[::-1]:
        met = met_by(case)
        night = all(left[pair] > 1 for pair in met)
        left.subtract(met if night else ())
        # What stands before the colon is trained by one process of the tests (tests/conftest.py).
        mesh = dims_of(case).describe()
        name = f"{mesh}: {', '.join(special_of(case)) or 'plain'}"
        marks = [pytest.mark.nightly] * night
        by_mesh[mesh][name_of(case)] = pytest.param(case, marks=marks, id=name)
    for same in by_mesh.values():
        yield from same.values()


@pytest.mark.parametrize("case", list(rows()))
def test_mesh_equals_one_process(case: Case, gloo_pool: GlooPool, one_process) -> None:
    mesh = dims_of(case)
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=120, keep=mesh)
    difference = tiny.compare(results, one_process(reference_of(case)))
    assert difference.worst < TOLERANCE, difference
    assert difference.between_ranks == 0, difference


def test_every_pair_is_met_by_day() -> None:
    by_day = [row.values[0] for row in rows() if not row.marks]
    assert set().union(*map(met_by, by_day)) == set().union(*map(met_by, TABLE))
    assert {case.schedule for case in by_day} == {case.schedule for case in TABLE}
    assert len(list(rows())) == len(TABLE)


@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_a_user_may_configure_it(case: Case) -> None:
    context = RunContext(case.config(), case.world_size, "cpu")
    assert errors_of(preflight(context, [ARITHMETIC])) == []


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in without_dropout(REFERENCES)
        if case.config().optimizer.name not in COMPACT and case.family != DRAWS
    ],
    ids=name_of,
)
def test_one_process_equals_a_plain_loop(
    case: Case, one_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of PyTorch's own parts: else all rows could be wrong alike."""
    config = case.config()
    family = get_family(config.model.name)
    args = family.resolve(config.model, tiny.VOCAB_SIZE)
    model = family.build(args).double()
    initialize_parameters(model, model.init_rule, config.debug.seed)
    if "freeze" in config.handlers:
        _freeze(model, **config.handlers["freeze"])
    quantised = "qlora" in config.handlers
    if settings := config.handlers.get("qlora" if quantised else "lora"):
        write_out(model, config.debug.seed, settings, quantised)
    optimizers = _optimizers(model, config.optimizer)
    # torch's Muon would orthogonalise in bfloat16.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    result, losses = tiny.Result(), plain_losses(case, model)
    for _ in range(tiny.NUM_STEPS):
        plain = losses()
        plain.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        result.losses += [plain.loss.item(), *map(float, plain.terms)]
        result.norms.append(norm.item())
    result.evaluated = losses().evaluated.item()
    tiny.collect([model], optimizers, result)
    found = one_process(case)
    if quantised:  # the same matrices are codes there
        found, result = without_bases(found), without_bases(result)
    assert tiny.compare([found], result).worst < TOLERANCE
    # A frozen embedding that is also the head leaves gradients too small to clip; so do adapters.
    if not ((case.tied and "freeze" in config.handlers) or kind_of(case)):
        assert min(result.norms) > tiny.MAX_NORM, "nothing is clipped"


def _freeze(model: nn.Module, patterns: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> None:
    matching = {
        tensor  # under any of its names
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, glob) for glob in patterns or only)
    }
    for tensor in model.parameters():
        if (tensor in matching) == bool(patterns):
            tensor.requires_grad_(False)


def _optimizers(model: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Norms have no weight decay."""
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    globs = settings.args.get("patterns", ["layers.*"]) if settings.name == "Muon" else []
    matrices = [
        tensor
        for name, tensor in trained.items()
        if tensor.dim() == 2 and any(fnmatchcase(name, glob) for glob in globs)
    ]
    norms = [tensor for name, tensor in trained.items() if name.endswith("norm.weight")]
    chosen = {id(tensor) for tensor in [*matrices, *norms]}
    others = [tensor for tensor in trained.values() if id(tensor) not in chosen]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    args = {key: value for key, value in settings.args.items() if key != "patterns"}
    if settings.name == "SGD":
        return [torch.optim.SGD(groups, **common, **args)]
    if settings.name == "Adafactor":
        return [torch.optim.Adafactor(groups, **common, **args)]
    betas = settings.beta1, settings.beta2
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=settings.eps, **common))
    if matrices:
        args = {"adjust_lr_fn": "match_rms_adamw", **args}
        optimizers.append(torch.optim.Muon(matrices, **common, **args))
    return optimizers


def test_the_references_differ(one_process) -> None:
    """Else rows would be compared with the wrong one unnoticed."""
    results = [one_process(case) for case in REFERENCES]
    losses = [(result.losses[0], result.evaluated) for result in results]
    assert len(set(losses)) == len(losses) > 3
