"""Loss spikes: a robust z-score on the device."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config import NonFiniteError
from torchtitan.config.schema import Training
from torchtitan.training.loss_spikes import LossSpikes
from torchtitan.training.nonfinite_guard import NonFiniteGuard
from torchtitan.training.nonfinite_origin import StepBatch

CPU = torch.device("cpu")


def allowed(window: int) -> bool:
    try:
        return bool(Training(loss_spike_window=window))
    except ValidationError:
        return False


def scores(spikes: LossSpikes, losses: list[float]) -> list[float]:
    return [float(spikes.score(torch.tensor(loss))) for loss in losses]


def losses_of(seed: int, count: int) -> list[float]:
    return (3 + 0.1 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_the_score_is_that_of_the_window() -> None:
    losses = losses_of(0, 30)
    found = scores(LossSpikes(6.0, 8, CPU), losses)
    assert found[:4] == [0] * 4  # until half of the window is known
    for step in range(4, 30):
        window = np.array(losses[max(0, step - 8) : step])
        lower = np.sort(window)[(len(window) - 1) // 2]  # torch's median is the lower one
        spread = np.sort(np.abs(window - lower))[(len(window) - 1) // 2]
        wanted = (losses[step] - lower) / (1.4826 * spread)
        assert found[step] == pytest.approx(wanted, rel=1e-4)


def test_a_loss_that_is_not_finite_does_not_enter_the_window() -> None:
    losses = losses_of(1, 12)
    spoiled = [*losses[:6], math.nan, math.inf, *losses[6:]]
    found = scores(LossSpikes(6.0, 6, CPU), spoiled)
    assert found[6:8] == [0, 0]
    assert found[:6] + found[8:] == scores(LossSpikes(6.0, 6, CPU), losses)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_it_goes_on_from_the_recent_losses(stop: int) -> None:
    losses = losses_of(2, 14)
    first = LossSpikes(6.0, 6, CPU)
    whole = scores(first, losses[:stop])
    whole += scores(LossSpikes(6.0, 6, CPU, first.recent), losses[stop:])
    assert whole == scores(LossSpikes(6.0, 6, CPU), losses)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a CUDA device: a number for the host, which `nanmedian` takes, too."""

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert str(function) not in {"aten._local_scalar_dense.default", "aten.nanmedian.default"}
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait() -> None:
    guard = NonFiniteGuard(lag=1, spikes=LossSpikes(6.0, 8, CPU, losses_of(3, 8), skips=True))
    loss = torch.tensor(3.0)
    with NoWaiting():
        guard.record(StepBatch(1, (), 1), loss, loss)


def test_equal_losses_make_no_spike_of_rounding() -> None:
    assert max(scores(LossSpikes(6.0, 4, CPU), [2.0] * 8 + [2.0 + 4e-7])) < 6


def test_only_so_many_in_a_row_are_skipped() -> None:
    spikes = LossSpikes(6.0, 100, CPU, losses_of(3, 100), skips=True)
    guard = NonFiniteGuard(lag=0, spikes=spikes, most_skipped=2)
    norm = torch.tensor(1.0)

    def step(number: int, loss: float) -> bool:
        return bool(guard.record(StepBatch(number, (), 1), torch.tensor(loss), norm))

    assert [step(1, 9.0), step(2, 9.0), step(3, 3.0), step(4, 9.0)] == [False, False, True, False]
    assert guard.num_skipped == 3
    step(5, 9.0)
    with pytest.raises(NonFiniteError, match=r"step 6: the loss 9\.0000 is a spike.*max_skipped"):
        step(6, 9.0)


def test_a_spike_that_is_trained_is_between_skipped_steps() -> None:
    spikes = LossSpikes(6.0, 100, CPU, losses_of(3, 100))
    guard = NonFiniteGuard(lag=0, spikes=spikes, skip_non_finite=True, most_skipped=1)
    for number, loss in enumerate((math.nan, 9.0, math.nan)):
        guard.record(StepBatch(number, (), 1), torch.tensor(loss), torch.tensor(1.0))
    assert guard.num_skipped == 2


def test_a_window_of_few_losses_is_refused() -> None:
    """The lower one of two losses has no deviation from itself: the next one would be a spike."""
    fewest = next(filter(allowed, range(99)))
    found = [scores(LossSpikes(6.0, fewest, CPU), losses_of(seed, 5)) for seed in range(20)]
    assert fewest // 2 > 3 and max(map(max, found)) < 1000


def test_without_skipping_of_what_is_not_finite_it_ends_the_run() -> None:
    spikes = LossSpikes(6.0, 4, CPU, skips=True)
    guard = NonFiniteGuard(lag=0, spikes=spikes, most_skipped=2)
    with pytest.raises(NonFiniteError, match="not finite"):
        guard.record(StepBatch(1, (), 1), torch.tensor(math.nan), torch.tensor(1.0))
