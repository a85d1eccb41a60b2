"""Resuming with other data than the checkpoint's: what that means, or beginning them anew."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.mixture import AnyPosition, MixedPosition, Mixture
from torchtitan.data.packing import Position


class Progress(NamedTuple):
    """How far the lanes are, on average."""

    epoch: int
    share: float
    """Of the epoch, from 0 to 1; about, as what is left of the current parts is not known."""


def restart(mixture: Mixture, states: Iterable[Mapping[str, Any]]) -> AnyPosition:
    """The place at which all lanes begin new data: the epoch after all that are stored.

    Shares of several sources begin anew, too. Raises ConfigError: `data.epochs` are over by then.
    """
    epoch = 1 + max(place["epoch"] for state in states for place in _places(state))
    epochs = mixture.sources[0].epochs
    if epochs is not None and epoch >= epochs:
        problem = f"data.restart would begin epoch {epoch}, and epochs 0 to {epochs - 1} are read"
        fix = f"set it to at least {epoch + 1}, or remove it"
        raise ConfigError(ConfigIssue("data.epochs", problem, fix, epochs))
    start = Position(epoch=epoch, first_epoch=epoch)
    count = len(mixture.sources)
    return MixedPosition(0, (0,) * count, (start,) * count) if count > 1 else start


def describe_change(mixture: Mixture, states: Iterable[Mapping[str, Any]], anew: bool) -> str:
    """Say in numbers what a resume with other data means, `anew` by data.restart or not."""
    all_places = list(zip(*(_places(state) for state in states)))
    parts = []
    for name, settings, places in zip(mixture.names, mixture.sources, all_places):
        done = _progress(settings, places)
        where = f"{done.share:.0%} through epoch {done.epoch}"
        if anew:
            text = f"{where}, the rest of which is not read"
        else:
            text = f"{where}: {_mixed_up(settings, done)}"
        parts.append(f"{name}: {text}" if len(mixture.sources) > 1 else text)
    told = "; ".join(parts)
    if anew:
        epoch = 1 + max(place["epoch"] for places in all_places for place in places)
        return (
            f"The data differ from the checkpoint's: epoch {epoch} begins them anew. It was {told}"
        )
    return (
        f"The data are not the checkpoint's, which was {told}."
        " data.restart = true would begin them anew, with the next epoch"
    )


def _mixed_up(settings: LaneSettings, done: Progress) -> str:
    """What the rest of the epoch holds, at worst. How much of it depends on the two orders: where
    they have nothing in common, it is `share * (1 - share)`."""
    share = min(done.share, 1 - done.share)
    total = sum(file.size for file in getattr(settings.source, "files", ()))
    amount = f" ({share * total / 2**20:,.3g} of {total / 2**20:,.3g} MiB)" if total else ""
    what = f"up to {share:.0%} of the data{amount}"
    return f"{what} are read twice in this epoch, and as much not at all"


def _progress(settings: LaneSettings, places: Iterable[Mapping[str, Any]]) -> Progress:
    own = max(1.0, len(settings.shards) / settings.num_lanes)
    amounts = []
    for place in places:
        inside = 0.5 if place["block"] or place["row"] or place["token"] else 0.0
        amounts.append(place["epoch"] + min(1.0, (place["shard"] + inside) / own))
    mean = sum(amounts) / len(amounts)
    return Progress(math.floor(mean), mean - math.floor(mean))


def _places(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The place of a lane in each source."""
    places: list[Mapping[str, Any]] = state.get("sources", [state])
    return places
