"""Sections about the optimisation: batch, precision, optimizer, learning rate."""

from typing import Annotated, Any, Literal

from pydantic import Field

from torchtitan.config.paths import PathText
from torchtitan.config.section import (
    Beta,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

DEFAULT_WARMUP = 200


class Dataloader(Section):
    num_workers: NonNegativeInt = 0
    """Processes per rank that read and tokenise. The data are the same for every number."""

    prefetch_factor: PositiveInt | None = None
    """Sequences that each worker keeps ready; needs `num_workers` above 0. Unset: 2."""

    pin_memory: bool = False
    """Copy batches to page-locked host memory, from which GPUs load faster."""


class Training(Section):
    dataset: str = "auto"
    """`stdlib` (the sources of Python's standard library), `json`, `text`, `parquet`, `tokens`,
    `c4`, `c4_validation`, `c4_test`, `hf:owner/name` (of the Hugging Face hub), `hf` (a folder that
    its `datasets` library reads), or a registered name. `auto` chooses by the files in
    `dataset_path`: `json`, `text`, `parquet` or `tokens`."""

    dataset_path: PathText | None = None
    """File, folder or glob to read; `c4` without it streams from the Hugging Face hub. Leave it
    unset when `data.sources` says what to read."""

    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank in one forward (a microbatch). Unset, and where 8 do not
    divide a rank's share of `global_batch_size`: the most below 8 that do."""

    global_batch_size: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Sequences per optimizer step over all ranks; -1 is `local_batch_size` times the data-parallel
    degree of the first start, which is then stored with the run."""

    seq_len: PositiveInt = 2048
    """Tokens per sequence."""

    steps: PositiveInt = 10000
    """Optimizer steps of the whole run."""

    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Gradients are scaled down to at most this global 2-norm; `inf` switches clipping off."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored (master) weights and of the optimizer state."""

    mixed_precision_param: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Type in which forward and backward compute."""

    mixed_precision_reduce: Literal["float32", "float64"] = "float32"
    """Type in which gradients are summed over ranks."""

    document_mask: bool = False
    """Documents packed into one sequence do not attend to, or predict, each other."""

    loss_chunks: PositiveInt | None = None
    """The head and the loss work on a microbatch in this many parts, so that the logits of only one
    part exist at a time. 1 computes them at once. Not set: 8, or fewer where a part would have
    fewer than 512 tokens, which costs time."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory: a unit's parameters are on the
    device while it computes, and the optimizer steps on the CPU. With FSDP and HSDP, not DDP."""

    gc_freq: PositiveInt = 50
    """Steps between two runs of Python's garbage collector, which is off in between."""

    gc_debug: bool = False
    """Run the garbage collector after every step, and name what keeps tensors alive until it comes:
    objects that refer to each other in a circle. Slow."""

    dataloader: Dataloader = Field(default_factory=Dataloader)
    """Reading processes."""


class DataSource(Section):
    path: PathText | None = None
    """File, folder or glob to read, as `training.dataset_path`."""

    dataset: str = "auto"
    """Kind of data, as `training.dataset`."""

    weight: NonNegativeFloat
    """Share of the tokens, in any unit: the weights of all sources are divided by their sum. 0
    leaves the source out for now."""

    column: str | None = None
    """Field of a row that holds the text. Unset: `data.text_column`."""

    encoding: str | None = None
    """Encoding of text and JSON files. Unset: `data.encoding`."""

    document_separator: str | None = None
    """What divides a text file into documents. Unset: `data.document_separator`."""

    subset: str | None = None
    """Subset of a Hugging Face dataset, as `data.subset`."""

    split: str = "train"
    """Split of a Hugging Face dataset, as `data.split`."""

    revision: str | None = None
    """Revision of a hub dataset, as `data.revision`."""

    streaming: bool = True
    """Whether to stream a Hugging Face dataset, as `data.streaming`."""

    name: str | None = None
    """What messages and metrics call the source. Unset: the last part of `path`, without its
    suffix, or `dataset`."""


class Data(Section):
    sources: Annotated[tuple[DataSource, ...], Field(strict=False)] = ()
    """Datasets that are mixed by token share, in place of `training.dataset_path`: a table
    `[[data.sources]]` each."""

    lanes: PositiveInt | None = None
    """Independent data streams; must divide `global_batch_size`, and the data-parallel degree must
    divide it. Unset: the largest divisor of `global_batch_size` up to 64."""

    text_column: str = "text"
    """Column (field of a JSON row) that holds the text, or a list of tokens."""

    encoding: str | None = None
    """Encoding of text and JSON files that begin with no byte-order mark: any codec of Python, such
    as `latin-1`, `cp1252` or `gb18030`. Unset: UTF-8."""

    document_separator: str | None = None
    """Text between two documents of one text file, such as `<|endoftext|>`, which belongs to
    neither. Unset: a text file is one document."""

    subset: str | None = None
    """Subset (configuration) of a Hugging Face dataset. Unset: its only one; `en` for C4."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; a commit keeps the data what they are. Unset: the
    newest."""

    streaming: bool = True
    """Read a Hugging Face dataset from where it is, file by file, instead of downloading and
    preparing all of it first."""

    add_bos: bool | None = None
    """Begin each document with the tokenizer's start token. Unset: as the tokenizer's files say."""

    add_eos: bool | None = None
    """End each document with the tokenizer's end token. Unset: as the tokenizer's files say."""

    shuffle: bool = True
    """Shuffle the documents anew in every epoch, by `debug.seed`."""

    epochs: PositiveInt | None = None
    """Passes over the data after which the run ends, even before `training.steps`. Unset: as many
    as the steps need. Of several `sources` each has its own passes, and this must be unset."""

    restart: bool = False
    """Where a resume finds other data than the checkpoint's, begin them anew, with the next epoch.
    With the same data nothing changes."""

    max_document_mib: PositiveFloat = 64.0
    """Rows larger than this (MiB of text) are treated as `on_bad_row` says. Text files are read in
    pieces, and may be of any size."""

    max_zstd_window_mib: NonNegativeInt = 4096
    """Memory that a process may hold for zstd windows above 128 MiB, as `zstd --long=28` to
    `--long=31` make them. Each lane that reads such a file holds one."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read: stop, or leave it out and count it."""

    max_bad_rows: NonNegativeInt = 100
    """With `on_bad_row = "skip"`: the run stops when all ranks together have left out
    more than this. Rows count in the first epoch only."""

    @property
    def max_document_bytes(self) -> int:
        """`max_document_mib` in bytes."""
        return max(1, int(self.max_document_mib * 2**20))


class Loss(Section):
    name: str = "cross_entropy"
    """Loss; `torchtitan list losses` prints them with their settings."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of the loss, for example `z_loss_weight = 1e-4`; every loss checks its own."""


class ParamGroup(Section):
    pattern: str
    """Glob over full parameter names, such as `*norm.weight`; the first group that matches wins."""

    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the group. Unset: `optimizer.weight_decay`."""

    lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate for the group."""


class Optimizer(Section):
    name: str = "AdamW"
    """Optimizer; `torchtitan list optimizers` prints them with their settings."""

    lr: NonNegativeFloat = 8e-4
    """Peak learning rate."""

    beta1: Beta = 0.9
    """Decay of Adam's first moment. Other optimizers refuse it, as `beta2` and `eps`."""

    beta2: Beta = 0.95
    """Decay of Adam's second moment."""

    eps: PositiveFloat = 1e-8
    """Added to the denominator of Adam's update."""

    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of parameters that no group says otherwise about."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed; `fused` falls back to `foreach` where the device, or the
    optimizer, lacks it."""

    early_step_in_backward: bool = False
    """Step each parameter, and free its gradient, as soon as the backward has it, so that not all
    gradients exist at once. Needs `training.max_norm = inf` and one microbatch a step."""

    param_groups: Annotated[tuple[ParamGroup, ...], Field(strict=False)] = (
        ParamGroup(pattern="*norm.weight", weight_decay=0.0),
    )
    """Exceptions by parameter name. By default norms have no weight decay."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of the optimizer's own, for example `momentum = 0.9`; every optimizer checks its
    own."""


class LRScheduler(Section):
    name: str = "warmup_stable_decay"
    """Schedule; `torchtitan list schedules` prints them. The keys below are those of
    `warmup_stable_decay`, others have theirs in `args`."""

    warmup_steps: NonNegativeInt | None = None
    """Steps in which the learning rate rises linearly; the last of them has the peak. 0: the first
    step has it. Unset: 200, or a fifth of `training.steps` where 200 and the decay do not fit into
    the run; stored with the run."""

    decay_ratio: Fraction | None = None
    """Share of `training.steps` in which the learning rate falls at the end; the first of these
    steps still has the peak. Unset: all steps after the warmup."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the fall."""

    min_lr_factor: Fraction = 0.0
    """Fraction of the peak that the learning rate falls towards. The step after the last one would
    have it."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Settings of another schedule than `warmup_stable_decay`, which checks them."""

    def warmup(self, training_steps: int) -> int:
        """Return `warmup_steps`, or how many steps of the run they are when unset."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        room = training_steps - round(training_steps * (self.decay_ratio or 0.0))
        return DEFAULT_WARMUP if room >= DEFAULT_WARMUP else min(training_steps // 5, room)

    def decay(self, training_steps: int) -> int:
        """Return the steps of the last phase: `decay_ratio` of the run, or all after the warmup."""
        if self.decay_ratio is None:
            return max(0, training_steps - self.warmup(training_steps))
        return round(training_steps * self.decay_ratio)
