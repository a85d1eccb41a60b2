"""The section about validation: what the model is tested on while it trains, and when."""

from typing import Annotated

from pydantic import Field

from torchtitan.config.paths import PathText
from torchtitan.config.section import PositiveInt, Section
from torchtitan.config.training_sections import Dataloader


class ValidationSet(Section):
    name: str
    """What metrics and messages call the set: letters, digits, `.`, `_` and `-`."""

    dataset: str = "auto"
    """Kind of data, as `training.dataset`."""

    dataset_path: PathText | None = None
    """File, folder or glob to read, as `training.dataset_path`."""

    column: str | None = None
    """Field of a row that holds the text. Unset: `data.text_column`."""

    encoding: str | None = None
    """Encoding of text and JSON files. Unset: `data.encoding`."""

    document_separator: str | None = None
    """What divides a text file into documents. Unset: `data.document_separator`."""

    subset: str | None = None
    """Subset of a Hugging Face dataset, as `data.subset`."""

    split: str | None = None
    """Split of a Hugging Face dataset. Unset: `validation`."""

    revision: str | None = None
    """Revision of a hub dataset, as `data.revision`."""

    streaming: bool = True
    """Whether to stream a Hugging Face dataset, as `data.streaming`."""


class Validation(Section):
    enable: bool = False
    """Measure the loss on data that are not trained on, while the run goes on and at its end."""

    dataset: str = "c4_validation"
    """Kind of data, as `training.dataset`, where there is one set. Metrics call it `validation`."""

    dataset_path: PathText | None = None
    """File, folder or glob of the one set. Leave it unset when `validation.sets` names several."""

    column: str | None = None
    """Field of a row that holds the text of the one set. Unset: `data.text_column`."""

    sets: Annotated[tuple[ValidationSet, ...], Field(strict=False)] = ()
    """Several sets, each with a loss of its own: a table `[[validation.sets]]` each."""

    freq: PositiveInt = 10
    """Steps between two validations. The last step of the run is always followed by one."""

    steps: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Most sequences of a set, in training steps: each stands for `training.global_batch_size`
    sequences, whatever the mesh. -1 takes the whole set."""

    local_batch_size: PositiveInt | None = None
    """Sequences per data-parallel rank in one forward; changes no loss. Unset:
    `training.local_batch_size`."""

    seq_len: PositiveInt | None = None
    """Tokens per sequence. Unset: `training.seq_len`."""

    lanes: PositiveInt | None = None
    """Streams that a set is read in, each by one data-parallel rank; where sequences begin depends
    on it. Unset: as many as the data have parts, at least 8 and at most 64."""

    dataloader: Dataloader = Field(default_factory=Dataloader)
    """Reading processes, which live as long as one validation of one set."""
