"""TensorBoard: the records of a run as scalars and charts, and texts about the run.

The whole run shares one folder, whose name is the run's in TensorBoard. After a resume the first
event of the new file tells TensorBoard from which step on to hide older events.
"""

import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torchtitan.metrics.sinks import Record, tagged

CHARTS: dict[str, dict[str, list[str]]] = {
    "Loss": {
        "training and validation": [r"loss$", r"validation/(.+/)?loss$"],
        "terms of the loss": [r"loss/.+"],
    },
    "Optimizer": {"gradient norm": [r"grad_norm$"], "learning rate": [r"lr$"]},
    "Speed, per device": {
        "tokens a second": [r"throughput/tps_per_device$"],
        "model FLOPs utilisation (%)": [r"mfu(_causal)?\(%\)$"],
    },
    "Memory": {
        "GiB": [r"memory/.+\(GiB\)$"],
        "share of the device (%)": [r"memory/.+\(%\)$"],
    },
    "Time": {
        "shares of the run (%)": [r"time_share/.+"],
        "seconds a step": [r"time_metrics/.+\(s\)$"],
    },
    "Data": {"tokens of each source": [r"source_tokens/.+"]},
}
"""Category -> chart -> patterns of its tags, in the order of the page Custom Scalars."""


class TensorBoardSink:
    """Event files in `folder/NAME`, under the tags of `TENSORBOARD_TAGS`.

    `name`: the run's in TensorBoard; a resumed run stays where its first start wrote. `texts`
    returns what is shown as text, by tag; it is called once, with the first record.
    """

    name = "TensorBoard"
    keeps_trying = False

    def __init__(
        self,
        folder: Path,
        name: str,
        rank: int | None = None,
        texts: Callable[[], Mapping[str, str]] = dict,
    ):
        self._folder = folder
        self._run_name = name
        self._rank = rank
        self._texts = texts
        self._step = 0
        self._writer: Any = None

    def resume(self, step: int) -> None:
        """Hide events of steps after `step`."""
        self._step = step

    def write(self, record: Record) -> None:
        """Add the values of the record as scalars."""
        values = tagged(record)
        if self._writer is None:
            self._open(values)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, record["step"])

    def flush(self) -> None:
        """Write pending events."""
        if self._writer is not None:
            self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Write pending events and close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, tags: Collection[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder = _run_folder(self._folder, self._run_name)
        if self._rank is not None:
            folder /= f"rank_{self._rank}"
        self._writer = SummaryWriter(str(folder), max_queue=1000, purge_step=self._step + 1)
        self._writer.add_custom_scalars(layout_of(tags))
        for tag, text in self._texts().items():
            self._writer.add_text(tag, text, self._step)


def layout_of(tags: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the charts that have any of `tags`: an empty one would show an error."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for category, charts in CHARTS.items():
        for chart, patterns in charts.items():
            if any(re.match(pattern, tag) for pattern in patterns for tag in tags):
                layout.setdefault(category, {})[chart] = ["Multiline", patterns]
    return layout


def as_code(text: str) -> str:
    """Return `text` as a Markdown block that is shown as it is, whatever it holds."""
    return textwrap.indent(text, "    ", lambda line: True)


def _run_folder(folder: Path, name: str) -> Path:
    """Return the folder of the run's events.

    Its name was another one if the run folder has been renamed, and older releases had none. A
    start from step 0 may find events, too: of a run that had saved nothing.
    """
    earlier = min(folder.rglob("*.tfevents.*"), default=None)
    if earlier is None or folder / name in earlier.parents:
        return folder / name
    parent = earlier.parent
    return parent.parent if re.fullmatch(r"rank_\d+", parent.name) else parent
