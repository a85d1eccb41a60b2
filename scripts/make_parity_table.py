"""Train every row of the parity table, and write docs/design/parity.md.

    python scripts/make_parity_table.py

Takes some minutes on two cores. Exits with 1, and writes nothing, if a row is not within the
table's tolerance, if ranks differ, or if a mistake is not noticed.
"""

import datetime
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.distributed import tiny  # noqa: E402
from tests.distributed.tiny import Case, Difference, Result  # noqa: E402
from tests.parity.historical_bugs import BUGS, train_wrongly  # noqa: E402
from tests.parity.table import (  # noqa: E402
    TABLE,
    TOLERANCE,
    dims_of,
    name_of,
    reference_of,
    special_of,
)
from tests.pool import GlooPool  # noqa: E402
from torchtitan import __version__  # noqa: E402

TEXT = """\
# The parity table

Change the mesh, keep the run: each row below trains the same model on the same data on another
mesh and is compared with one process. `python scripts/make_parity_table.py` made this page on
{date}, with torchtitan {version}, PyTorch {torch} and Python {python}, on the CPU ({machine}) with
gloo. `tests/parity/` requires the same of every row: nightly of those that repeat
what others prove, of the others on every change.

The model is a Llama of width {dim}, where {heads} query heads share {kv_heads} of keys and values,
with a vocabulary of {vocab} tokens. A step has {sequences} sequences of {seq_len} tokens, of which
some have no target at all. There are {steps} steps, of AdamW unless a row names another optimizer,
in float64; gradients, of norms from {smallest_norm:.1g} to {largest_norm:.2f}, are clipped to
{max_norm}, which those of adapters are below.

How to read it: the numbers are the largest relative differences to one process. *Loss* is over the
losses of all steps and the loss of `evaluate` at the end, *norm* over the gradient norms of all
steps. *Parameters* and *moments* are, for each tensor and what the optimizer keeps of it (both
moments of AdamW) after the last step, max|a - b| / max|b|, over all elements on all ranks; the
largest of all tensors is shown. What
float64 rounds away is about 2e-16 of a number. Sums are made in another order on another mesh, so
differences are not 0; Adam divides gradients by their own size, so they grow where a gradient is
nearly 0. The table tolerates {tolerance:.0e}. What several ranks hold alike has the same bits on
all of them.

*tied*: the head uses the embedding's matrix. *packed*: several documents in a sequence, which do
not see each other. *padded*: each of them in a sequence of its own, compared with packed ones.
*accumulates*: the gradients of so many batches add up to a step. Context
parallelism is named with its method and load balancer, pipeline parallelism with its schedule, and
a norm other than RMSNorm with its kind; `fused_rmsnorm` is compared with `rmsnorm`. *Frozen*: those
parameters are not trained. *Muon by name*: other matrices, and other settings of it. *On the host*:
parameters, gradients and moments, or activations, wait in host memory (on a CPU in other memory).
*z-loss*, *label smoothing*: of weight 0.01 and 0.1, in what is minimised, not in `evaluate`.
*yarn*: RoPE is stretched by YaRN, four times.
*Tied naively*, *shared by blocks*, *one block*, *biased*, *low rank*: families from outside (the
first's head takes the embedding's matrix without declaring it; two blocks share a feed-forward and
a matrix; all blocks are one; every linear has a bias, and attention a parameter of its own; linears
have adapters, which tensor ranks hold whole where these are small). *Dropping*: a family with
dropout, in microbatches of one sequence, compared with one process that has them too.

| processes | mesh | special | loss | norm | parameters | moments |
|---:|---|---|---:|---:|---:|---:|
{rows}

{number} rows; the largest difference of all is {worst:.0e}.

## What a mistake looks like

Mistakes that libraries of this kind have made, put back one at a time into this one, each on the
smallest mesh that shows it, with the largest relative difference that the table then finds.
`torchtitan bisect` finds each of them, with the module or tensor and the axis of the mesh
([debugging](../guides/debugging.md#my-loss-differs-on-another-mesh),
`tests/parity/test_bisect_finds.py`).

| mistake | mesh | difference |
|---|---|---:|
{mistakes}
"""


class Trainer:
    """Trains rows in one pool of processes, and one process for comparison."""

    def __init__(self) -> None:
        self._pool = GlooPool()
        self._references: dict[str, Result] = {}

    def close(self) -> None:
        self._pool.close()

    @property
    def norms(self) -> list[float]:
        """Of all gradients in one process."""
        return [norm for result in self._references.values() for norm in result.norms]

    def difference(self, case: Case) -> Difference:
        """What a row's mesh does differently."""
        results = self._pool.run(case.world_size, tiny.train, case, timeout=120)
        return tiny.compare(results, self._reference(case))

    def difference_with(self, mistake: str) -> float:
        """The same of a mistake."""
        case = BUGS[mistake].case
        ranks = self._pool.run(case.world_size, train_wrongly, mistake, timeout=120)
        return tiny.compare([result for result, _ in ranks], self._reference(case)).worst

    def _reference(self, case: Case) -> Result:
        name = name_of(reference_of(case))
        if name not in self._references:
            self._references[name] = self._pool.run(1, tiny.train, reference_of(case))[0]
        return self._references[name]


def row_text(case: Case, found: Difference) -> str:
    numbers = [max(found.losses, found.evaluated), found.norms, found.parameters, found.moments]
    words = [dims_of(case).describe(), ", ".join(special_of(case))]
    return _line([str(case.world_size), *words, *map(_number, numbers)])


def mistake_text(name: str, difference: float) -> str:
    words = f"{name.replace('_', ' ')}: {BUGS[name].put_back.__doc__}"
    return _line([words, name_of(BUGS[name].case), _number(difference)])


def _number(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    trainer = Trainer()
    rows, worst = [], 0.0
    try:
        for case in TABLE:
            found = trainer.difference(case)
            rows.append(row_text(case, found))
            print(rows[-1], flush=True)
            if not found.worst < TOLERANCE or found.between_ranks > 0:
                return 1
            worst = max(worst, found.worst)
        mistakes = []
        for name in BUGS:
            difference = trainer.difference_with(name)
            mistakes.append(mistake_text(name, difference))
            print(mistakes[-1], flush=True)
            if not difference > TOLERANCE:
                return 1
    finally:
        trainer.close()
    path = ROOT / "docs" / "design" / "parity.md"
    path.write_text(_page(trainer, rows, worst, mistakes), encoding="utf-8")
    print(f"wrote {path}")
    return 0


def _page(trainer: Trainer, rows: list[str], worst: float, mistakes: list[str]) -> str:
    return TEXT.format(
        date=datetime.datetime.now(tz=datetime.timezone.utc).date(),
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        dim=Case().config().model.args["dim"],
        heads=Case.heads,
        kv_heads=Case.kv_heads,
        vocab=tiny.VOCAB_SIZE,
        sequences=tiny.NUM_SEQUENCES,
        seq_len=tiny.SEQ_LEN,
        steps=tiny.NUM_STEPS,
        smallest_norm=min(trainer.norms),
        largest_norm=max(trainer.norms),
        max_norm=tiny.MAX_NORM,
        tolerance=TOLERANCE,
        rows="\n".join(rows),
        number=len(rows),
        worst=worst,
        mistakes="\n".join(mistakes),
    )


if __name__ == "__main__":
    sys.exit(main())
