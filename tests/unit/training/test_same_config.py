"""Ranks whose configs differ, as where a base was copied to each machine, do not start."""

import json
from typing import Any

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.config.load import load_config
from torchtitan.training.same_config import require_same_config


class Rank1:
    """The second of two ranks; `first`: what rank 0 sends."""

    is_main = False

    def __init__(self, first: Any):
        self.first = first

    def broadcast_json(self, value: None) -> Any:
        return self.first

    def gather_json(self, value: Any) -> list[Any]:
        return [[], json.loads(json.dumps(value))]


class Rank0(Rank1):
    is_main = True

    def broadcast_json(self, value: Any) -> Any:
        self.first = json.loads(json.dumps(value))
        return self.first


def check(*flags: str) -> None:
    here = Rank0(None)
    config = load_config(["debug_model", "--training.max_norm=inf"]).config
    require_same_config(config, here)  # type: ignore[arg-type]
    other = load_config(["debug_model", "--training.max_norm=inf", *flags]).config
    require_same_config(other, Rank1(here.first))  # type: ignore[arg-type]


def test_what_differs_is_named_with_the_rank():
    with pytest.raises(ConfigError) as caught:
        check("--checkpoint.interval", "3", "--model.args.dim", "32")
    keys = [issue.key for issue in caught.value.problems]
    assert sorted(keys) == ["checkpoint.interval", "model.args.dim"]
    assert caught.value.problems[0].problem == "differs between ranks 0 and 1"


def test_paths_and_what_is_of_a_machine_may_differ():
    check()
    check("--job.dump_folder", "x", "--training.dataset_path", "y", "--debug.threads", "1")
