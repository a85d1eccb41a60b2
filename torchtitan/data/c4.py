"""C4 (https://arxiv.org/abs/1910.10683): a folder in its layout, or the hub; a tiny set of ours.

In its layout the files are `en/c4-train.00000-of-01024.json.gz` and so on, lines of JSON with the
columns text, timestamp and url. `scripts/make_c4_test.py` has written the set that tests use.
"""

import glob
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Data, Training

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

HUB_ID = "allenai/c4"
SUBSET = "en"
TEST_FOLDER = Path(__file__).parents[2] / "tests" / "assets" / "c4_test"


def c4_test(training: Training, data: Data) -> "Source":
    """The training split of the tiny set, or of the folder that `dataset_path` names."""
    if training.dataset_path is None and not TEST_FOLDER.is_dir():
        problem = f"this installation is without the repository's {TEST_FOLDER.name} folder"
        fix = 'run from a clone, give the path of a folder, or set dataset = "stdlib"'
        raise ConfigError(
            ConfigIssue("training.dataset", problem, fix, training.dataset, missing_asset=True)
        )
    path = training.dataset_path or str(TEST_FOLDER)
    return _from_files(path, "train", data)


def default_validation(path: str | None) -> str:
    """Return the dataset to validate on where a config has a path, or None, and no name."""
    if path is None:
        return "c4_validation"
    folder = Path(path).expanduser()
    of_c4 = (found for form in ("", "*/") for found in folder.glob(f"{form}c4-validation.*.json*"))
    return "auto" if next(of_c4, None) is None else "c4_validation"


def _split(split: str, training: Training, data: Data) -> "Source":
    if training.dataset_path is not None:
        return _from_files(training.dataset_path, split, data)
    from torchtitan.data.sources_hub import hub_source

    data = data.model_copy(update={"split": split, "subset": data.subset or SUBSET})
    return hub_source(HUB_ID, training, data)


def _from_files(path: str, split: str, data: Data) -> "Source":
    from torchtitan.data.registry import file_source

    return file_source(_layout(path, split, data.subset or SUBSET), "json", data)


c4 = partial(_split, "train")
c4_validation = partial(_split, "validation")


def _layout(path: str, split: str, subset: str) -> str:
    """The glob of a split's files in a folder of C4's layout; any other path as it is."""
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        return path
    inner = os.path.join(folder, subset)
    folder = inner if os.path.isdir(inner) else folder
    named = sorted(Path(folder).glob("c4-*.json*"))
    if not named and split == "train" and next(Path(folder).rglob("c4-*.json*"), None) is None:
        return folder  # a part of C4 under other names
    if any(file.name.startswith(f"c4-{split}.") for file in named):
        return os.path.join(glob.escape(folder), f"c4-{split}.*.json*")
    raise ConfigError(
        ConfigIssue(
            "training.dataset_path",
            f"the folder holds no c4-{split}.*.json.gz, nor does {subset}/ in it",
            "give the folder of a clone of C4, or name files by a glob",
            value=path,
            missing_asset=True,
        )
    )
