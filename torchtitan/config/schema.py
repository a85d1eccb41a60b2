"""All sections of a config, in the order of a TOML file; `JobConfig` at the end holds them.

Sections are frozen pydantic models. They are strict (a string is never taken for a number), reject
unknown keys, and reject nan and inf, which TOML can write. The docstring below a field is its
documentation everywhere: in `--help`, in the JSON schema and in docs/reference/settings.md.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from torchtitan.config.paths import PathText

MAX_INT64 = 2**63 - 1
MAX_TRACE_ENTRIES = 2**31 - 1
DEFAULT_WARMUP = 200

PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT64)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A TOML array of strings."""
NormType = Literal["rmsnorm", "layernorm", "np_layernorm", "fused_rmsnorm"]
DataFormat = Literal["text", "chat", "instruct", "preference"]
TrainOn = Literal["assistant", "last", "all"]
OnLong = Literal["truncate_right", "truncate_left", "split", "drop"]
PipelineSchedule = Literal[
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )


class Job(Section):
    """The run: where it writes and on what it runs."""

    config_file: PathText | None = Field(default=None, examples=["my.toml"])
    """TOML file of the run. Values on the command line win over it."""

    dump_folder: PathText = "./outputs"
    """The run folder: everything the run writes lies below it."""

    description: str = "default job"
    """A description of the run, for the log and the stored config."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto` takes CUDA when there is a GPU, else the CPU."""

    print_config: bool = False
    """Log the resolved config at the start."""

    new_run: bool = False
    """Start afresh in a folder that holds another run; the old folder's content is moved aside."""

    custom_import: Names = Field(default=(), examples=[["my_project.models"]])
    """Modules to import before the config is checked, to register models, handlers, datasets,
    tokenizers, losses, optimizers, schedules, masks or sinks of metrics."""


class Model(Section):
    """The model and its tokenizer."""

    name: str = "llama3"
    """Model family; `torchtitan list models` prints the families with their flavors."""

    flavor: str = "debugmodel"
    """Size within the family. `from_checkpoint` takes family and hyper-parameters from
    `checkpoint.initial_load_path`; what `args` set wins over them."""

    tokenizer_path: PathText = "bytes"
    """`bytes` (one token a byte, needs no file), a `tokenizer.json`, a `tokenizer.model` of
    tiktoken or sentencepiece, or a folder that holds one. Unset: the tokenizer of
    `checkpoint.initial_load_path`, or `bytes` without one. The run folder keeps a copy."""

    norm_type: NormType = "rmsnorm"
    """Norm before attention and feed-forward and at the end: `rmsnorm`; `fused_rmsnorm`, the same
    by PyTorch's own function on every device; `layernorm` without a bias; `np_layernorm` without
    parameters."""

    handlers: Names = Field(default=(), examples=[["compile"]])
    """Model handlers, applied in this order; each has its settings in `[handlers.NAME]`."""

    print_after_conversion: bool = False
    """Log the model's modules after the handlers have changed it, and before it is sharded."""

    args: dict[str, Any] = Field(default_factory=dict, examples=[{"n_layers": 4}])
    """Hyper-parameters that override the flavor's, for example `n_layers = 4`."""


class Dataloader(Section):
    """Reading processes."""

    num_workers: NonNegativeInt = 0
    """Processes per rank that read and tokenise. The data are the same for every number."""

    prefetch_factor: PositiveInt | None = None
    """Sequences that each worker keeps ready; needs `num_workers` above 0. Unset: 2."""

    pin_memory: bool = False
    """Copy batches to page-locked host memory, from which GPUs load faster."""


class Training(Section):
    """Batch, sequence length, steps, precision."""

    dataset: str = "auto"
    """`stdlib` (the sources of Python's standard library), `json`, `text`, `parquet`, `tokens`,
    `c4`, `c4_validation`, `c4_test`, `hf:owner/name` (of the Hugging Face hub), `hf` (a folder that
    its `datasets` library reads), or a registered name. `auto` chooses by the files in
    `dataset_path`: `json`, `text`, `parquet` or `tokens`."""

    dataset_path: PathText | None = Field(default=None, examples=["my_data/*.jsonl"])
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
    """Optimizer steps of the whole run. Unset, with `data.epochs`: as many as the epochs are, where
    the data are files of at most 256 MiB."""

    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Gradients are scaled down to at most this global 2-norm; `inf` switches clipping off."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """At a step whose loss or gradient norm is NaN or infinite: `stop` ends the run before the
    update, `skip` leaves the update out and goes on. Both name the module in which it began."""

    on_loss_spike: Literal["ignore", "report", "skip"] = "report"
    """At a step whose loss is a spike: `report` warns, `skip` leaves its update out, too."""

    loss_spike_threshold: PositiveFloat = 6.0
    """A loss so many standard deviations above the median of the losses before it is a spike. The
    deviation is estimated from the median absolute deviation."""

    loss_spike_window: Annotated[int, Field(ge=8)] = 100
    """Losses that a new one is compared with. None is a spike before half of them are known."""

    max_skipped_steps: PositiveInt = 10
    """Steps in a row that `skip` may leave out; one more ends the run."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored (master) weights and of the optimizer state."""

    mixed_precision_param: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Type in which forward and backward compute."""

    mixed_precision_reduce: Literal["float32", "float64"] = "float32"
    """Type in which gradients are summed over ranks."""

    document_mask: bool = False
    """Documents packed into one sequence do not attend to, or predict, each other. Unset: on where
    `data.format` is not `text`."""

    loss_chunks: PositiveInt | None = Field(default=None, examples=[8])
    """The head and the loss work on a microbatch in this many parts, so that the logits of only one
    part exist at a time. 1 computes them at once. Not set: 8, or fewer where a part would have
    fewer than 512 tokens, which costs time."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory: a unit's parameters are on the
    device while it computes, and the optimizer steps on the CPU. With FSDP and HSDP, not DDP."""

    max_seconds: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[14400.0])
    """Stop, and save, before a process of the run is this old; the time that a save takes is kept
    free. The same command goes on. For a scheduler's time limit, less what a start takes."""

    gc_freq: PositiveInt = 50
    """Steps between two runs of Python's garbage collector, which is off in between."""

    gc_debug: bool = False
    """Run the garbage collector after every step, and name what keeps tensors alive until it comes:
    objects that refer to each other in a circle. Slow."""

    dataloader: Dataloader = Field(default_factory=Dataloader)
    """Reading processes."""


class DataSource(Section):
    """One dataset of a mixture, a table `[[data.sources]]`."""

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
    """Text between two documents of a text file. Unset: `data.document_separator`."""

    subset: str | None = None
    """Subset of a Hugging Face dataset, as `data.subset`."""

    split: str = "train"
    """Split of a Hugging Face dataset, as `data.split`."""

    revision: str | None = None
    """Revision of a hub dataset, as `data.revision`."""

    streaming: bool = True
    """Stream a Hugging Face dataset, as `data.streaming`."""

    name: str | None = None
    """Name in messages and metrics. Unset: the last part of `path`, without its suffix, or
    `dataset`."""

    format: DataFormat | None = None
    """Content of a row, as `data.format`. Unset: `data.format`."""

    columns: dict[str, str] | None = None
    """Other names of columns and keys, as `data.columns`. Unset: `data.columns`."""

    roles: dict[str, str] | None = None
    """Other names of roles, as `data.roles`. Unset: `data.roles`."""


class Data(Section):
    """Reading documents and packing them into sequences."""

    sources: Annotated[tuple[DataSource, ...], Field(strict=False)] = ()
    """Datasets that are mixed by token share, in place of `training.dataset_path`: a table
    `[[data.sources]]` each."""

    lanes: PositiveInt | None = Field(default=None, examples=[64])
    """Independent data streams; must divide `global_batch_size`, and the data-parallel degree must
    divide it. Unset: the largest divisor of `global_batch_size` up to 64."""

    format: DataFormat = "text"
    """Content of a row: `text`; `chat`, a conversation in `messages` or `conversations`;
    `instruct`, a question and its answer (`instruction`, `input`, `output`, or `prompt`,
    `completion`); `preference`, two answers (`prompt`, `chosen`, `rejected`)."""

    columns: dict[str, str] = Field(
        default_factory=dict, examples=[{"messages": "dialogue", "content": "text"}]
    )
    """Names in these data of the columns that `format` reads, and of `role` and `content` in a
    message, for example `{messages = "dialogue", content = "text"}`."""

    roles: dict[str, str] = Field(default_factory=dict, examples=[{"customer": "user"}])
    """Roles of these data as `system`, `developer`, `user`, `assistant` or `tool`, for example
    `{customer = "user"}`. ShareGPT's `human` and `gpt` are known."""

    chat_template: PathText | None = Field(default=None, examples=["chatml"])
    """Jinja template that writes a conversation as text: a file, or `chatml`, `llama3`, `mistral`
    or `qwen3`. Unset: the tokenizer's own, or `chatml` for one without."""

    train_on: TrainOn = "assistant"
    """Tokens of a conversation that are trained: the `assistant`'s turns, the `last` one of these,
    or `all`. A message's own `weight` or `train` wins."""

    on_long: OnLong = "truncate_right"
    """Policy for a conversation longer than `training.seq_len`: cut off its end, or (with
    `truncate_left`) its beginning, `split` it into several, or `drop` it. They are counted."""

    packing: bool = True
    """Put several whole conversations into a sequence, as many as fit. `false`: one a sequence, and
    a batch is as long as its longest."""

    pad_to_multiple: PositiveInt = 64
    """Without `packing`: batches are padded to a multiple of so many tokens, at most
    `training.seq_len`."""

    text_column: str = "text"
    """Column (field of a JSON row) that holds the text, or a list of tokens."""

    encoding: str | None = Field(default=None, examples=["latin-1"])
    """Encoding of text and JSON files that begin with no byte-order mark: any codec of Python, such
    as `latin-1`, `cp1252` or `gb18030`. Unset: UTF-8."""

    document_separator: str | None = Field(default=None, examples=["<|endoftext|>"])
    """Text between two documents of one text file, such as `<|endoftext|>`, which belongs to
    neither. Unset: a text file is one document."""

    subset: str | None = Field(default=None, examples=["en"])
    """Subset (configuration) of a Hugging Face dataset. Unset: its only one; `en` for C4."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    revision: str | None = Field(default=None, examples=["main"])
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

    epochs: PositiveInt | None = Field(default=None, examples=[3])
    """Passes over the data after which the run ends, even before `training.steps`; may grow later.
    Unset: as many as the steps need. Of several `sources` each has its own passes, and this must be
    unset."""

    restart: bool = False
    """Start the data anew, with the next epoch, if a resume finds other data than the checkpoint's.
    With the same data nothing changes."""

    skip: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), examples=[["1200-1300", "1450"]]
    )
    """Steps of the data to leave out, for example `["1200-1300", "1450"]`, both ends included. They
    are numbered as the steps of a run that leaves none out."""

    ledger: bool = False
    """Keep a record of the rows that each step trains on, for `torchtitan data show RUN STEP`."""

    max_document_mib: PositiveFloat = 64.0
    """Rows larger than this (MiB of text) are treated as `on_bad_row` says. Text files are read in
    pieces, and may be of any size."""

    max_zstd_window_mib: NonNegativeInt = 4096
    """Memory that a process may hold for zstd windows above 128 MiB, as `zstd --long=28` to
    `--long=31` make them. Each lane that reads such a file holds one."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Policy for a row that cannot be read: stop, or leave it out and count it."""

    max_bad_rows: NonNegativeInt = 100
    """With `on_bad_row = "skip"`: the run stops when all ranks together have left out
    more than this. Rows count in the first epoch only."""

    read_retries: NonNegativeInt = 5
    """Times that a read is tried again, after pauses of 1, 2, 4, ... and at most 64 seconds, if a
    disk or a network fails as it may for a moment. What does not pass, such as a missing file,
    stops the run at once."""

    @property
    def max_document_bytes(self) -> int:
        """`max_document_mib` in bytes."""
        return max(1, int(self.max_document_mib * 2**20))


class Loss(Section):
    """The loss; `training.loss_chunks` says in how many parts it is computed."""

    name: str = "cross_entropy"
    """Loss; `torchtitan list losses` prints them with their settings."""

    args: dict[str, Any] = Field(default_factory=dict, examples=[{"z_loss_weight": 1e-4}])
    """Settings of the loss, for example `z_loss_weight = 1e-4`; every loss checks its own."""


class ParamGroup(Section):
    """One table of `optimizer.param_groups`."""

    pattern: str
    """Glob over full parameter names, such as `*norm.weight`; the first group that matches wins."""

    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the group. Unset: `optimizer.weight_decay`."""

    lr_factor: PositiveFloat = 1.0
    """Multiplies the learning rate for the group."""


class Optimizer(Section):
    """Optimizer and parameter groups."""

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
    """Weight decay of parameters in no group that sets it."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """Implementation of the update; `fused` falls back to `foreach` where the device, or the
    optimizer, lacks it."""

    early_step_in_backward: bool = False
    """Step each parameter, and free its gradient, as soon as the backward has it, so that not all
    gradients exist at once. Needs `training.max_norm = inf` and one microbatch a step."""

    param_groups: Annotated[tuple[ParamGroup, ...], Field(strict=False)] = (
        ParamGroup(pattern="*norm.weight", weight_decay=0.0),
    )
    """Exceptions by parameter name. By default norms have no weight decay."""

    args: dict[str, Any] = Field(default_factory=dict, examples=[{"momentum": 0.9}])
    """Settings of the chosen optimizer, for example `momentum = 0.9`; every optimizer checks its
    own."""


class LRScheduler(Section):
    """The schedule of the learning rate: by default warmup, stable phase, decay."""

    name: str = "warmup_stable_decay"
    """Schedule; `torchtitan list schedules` prints them. The keys below are those of
    `warmup_stable_decay`; other schedules have theirs in `args`."""

    warmup_steps: NonNegativeInt | None = Field(default=None, examples=[200])
    """Steps in which the learning rate rises linearly; the last of them has the peak. 0: the first
    step has it. Unset: 200, or a fifth of `total_steps` where 200 and the decay do not fit into
    these; stored with the run."""

    decay_ratio: Fraction | None = None
    """Share of `total_steps` in which the learning rate falls at the end; the first of these
    steps still has the peak. Unset: all steps after the warmup."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the fall."""

    min_lr_factor: Fraction = 0.0
    """Fraction of the peak that the learning rate falls towards. The step after the last one would
    have it."""

    total_steps: PositiveInt | None = Field(default=None, examples=[10000])
    """Steps of the schedule, at least `training.steps`: a run that ends before it has the rates of
    the longer one. Unset: `training.steps`."""

    args: dict[str, Any] = Field(default_factory=dict, examples=[{"power": 2.0}])
    """Settings of another schedule than `warmup_stable_decay`, which checks them."""

    def length(self, training_steps: int) -> int:
        """Return the steps of the schedule."""
        return self.total_steps or training_steps

    def warmup(self, steps: int) -> int:
        """Return `warmup_steps`, or how many steps of the schedule they are when unset."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        room = steps - round(steps * (self.decay_ratio or 0.0))
        return DEFAULT_WARMUP if room >= DEFAULT_WARMUP else min(steps // 5, room)

    def decay(self, steps: int) -> int:
        """Return the steps of the last phase: `decay_ratio` of all, or those after the warmup."""
        if self.decay_ratio is None:
            return max(0, steps - self.warmup(steps))
        return round(steps * self.decay_ratio)


class Parallelism(Section):
    """The mesh: how many processes train, and how the model is cut over them."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Copies of the model. With a shard degree of 1 this is DDP, above 1 it is HSDP."""

    data_parallel_shard_degree: int = Field(default=-1, ge=-1, le=2**31)
    """Ranks over which FSDP2 shards parameters, gradients and optimizer state; -1 takes all that
    are left."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered parameters after the forward: `always`, `never`, or `default` (always, but not
    with pipeline parallelism, where every microbatch would gather them again, and not on a single
    device, where `always` saves memory at the cost of some time)."""

    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which single weight matrices, and the sequence between them, are cut."""

    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits of the whole vocabulary on every rank before the
    loss, instead of computing it on the cut vocabulary. Slower, and takes more memory."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallelism's communication with its matrix products, piece by piece. CUDA
    with the handler `compile` only."""

    context_parallel_degree: PositiveInt = 1
    """Ranks over which the sequence is cut."""

    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """Exchange by which attention sees the whole sequence: `allgather` collects all keys and
    values, `ring` passes them from rank to rank and holds one rank's share at a time, `ulysses`
    exchanges sequence for heads (`allgather` and `ring` are TorchTitan's rotate methods `allgather`
    and `alltoall`)."""

    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """Parts of the sequence that a rank holds: with `headtail` one from its start and one from its
    end, so that causal attention costs every rank the same; with `none` one in order. Ulysses
    needs no balance and takes `none`."""

    pipeline_parallel_degree: PositiveInt = 1
    """Ranks over which the layers are cut into stages."""

    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Order of the forwards and backwards of a step's microbatches. GPipe and 1F1B have one stage
    per rank, ZBVZeroBubble and DualPipeV two, the others two or more."""

    pipeline_parallel_schedule_csv: PathText = Field(default="", examples=["schedule.csv"])
    """File with a custom schedule, a line per pipeline rank, in the format of
    torch.distributed.pipelining (without communication). It takes the place of
    `pipeline_parallel_schedule`."""

    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences of one pipeline microbatch; must divide `training.local_batch_size`. The schedule
    runs once a step, over all of its microbatches, those of gradient accumulation too."""

    pipeline_parallel_layers_per_stage: PositiveInt | None = None
    """Layers of a stage, which sets the number of stages; embedding and head count for a layer each
    in it, unless the two keys below say otherwise. Unset: one stage per rank for GPipe and 1F1B,
    two for the others."""

    pipeline_parallel_first_stage_less_layers: NonNegativeInt | None = None
    """Layers that the embedding counts for in a balanced cut. Unset: by its parameters."""

    pipeline_parallel_last_stage_less_layers: NonNegativeInt | None = None
    """Layers that the head counts for in a balanced cut. Unset: by its parameters."""

    module_fqns_per_model_part: Annotated[tuple[Names, ...], Field(strict=False)] = Field(
        default=(), examples=[[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]]
    )
    """The modules of every stage by name, instead of a balanced cut: `tok_embeddings`, `layers.0`,
    ..., `norm`, `output`, each in exactly one stage, in order."""

    pipeline_parallel_split_points: Names = Field(default=(), examples=[["layers.8", "layers.16"]])
    """The modules at which a new stage begins, such as `layers.8`, instead of a balanced cut or of
    listing the modules of every stage."""


class ActivationCheckpoint(Section):
    """Recompute activations in the backward to save memory."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
    """`full` recomputes every block in the backward, `selective` a part of them (see
    `selective_ac_option`), `none` keeps everything. `memory_budget` leaves it to the compiler to
    choose what is cheapest to recompute; it needs the handler `compile`."""

    selective_ac_option: str = "2"
    """With `selective`: `op` keeps what is expensive to recompute (attention, every second matrix
    product), a number n recomputes every n-th block."""

    @field_validator("selective_ac_option")
    @classmethod
    def _op_or_number(cls, value: str) -> str:
        if value == "op" or (value.isascii() and value.isdigit() and int(value) > 0):
            return value
        raise ValueError('is neither "op" nor a positive number. Fix: write "op", or "2" for half')

    memory_budget: Fraction = 0.5
    """With `memory_budget`: memory that a block's activations may take, from 0 (that of `full`) to
    1 (what the compiler keeps by itself)."""

    preserve_rng_state: bool = True
    """Restore the random state for the recomputation; only needed by models with dropout."""

    offload: bool = False
    """Keep in host memory, until the backward, what the blocks' activations take; on CUDA the
    copies overlap with the computation. Works with every `mode`, for what it keeps."""


class Checkpoint(Section):
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest good one."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, below `job.dump_folder`."""

    interval: PositiveInt = 500
    """Steps between two checkpoints."""

    remote_folder: PathText | None = Field(default=None, examples=["s3://bucket/runs/mine"])
    """Folder in an object store, such as `s3://bucket/runs/mine`, for a copy of the run. Steps are
    uploaded while training goes on, and `keep_latest_k` counts there, too. A start whose
    `job.dump_folder` lacks the newest step downloads it. Of one run; needs `s3fs`, `gcsfs` or
    `adlfs`."""

    keep_latest_k: NonNegativeInt = 10
    """Checkpoints to keep, at least 2; 0 keeps all."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints while training goes on, from copies in host memory. `async` makes the
    copies before the next step; `async_with_pinned_mem` overlaps them with it on a GPU, and keeps
    the memory between saves."""

    enable_first_step_checkpoint: bool = False
    """Save after step 1, too, to see early that saving works."""

    load_step: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Step to resume from; -1 is the newest good one."""

    last_save_model_only: bool = False
    """Save only the model at the last step: smaller, but the run cannot be continued from there."""

    last_save_in_hf: bool = False
    """Export the last step when the run is over, as `torchtitan export` does: to the Hugging Face
    folder `hf/step-N` in `job.dump_folder`, in the type `export_dtype`."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights that `last_save_model_only` and `last_save_in_hf` write;
    `float32` leaves them in theirs. `float16` holds nothing beyond 65504."""

    load_only: bool = False
    """Load as usual, and save nothing."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0, with one process, and end. A run on any mesh, in the same
    `job.dump_folder`, then starts from them."""

    initial_load_path: PathText | None = Field(default=None, examples=["hf://owner/name"])
    """Start of a new run: the folder of a `step-N`, weights that
    `torch.distributed.checkpoint` saved, a Hugging Face folder (safetensors), Meta's folder
    (`consolidated.*.pth`), a GGUF file of a Llama or Qwen3, or `hf://owner/name[@revision]`,
    which is downloaded. Once the run has checkpoints of its own, they count."""

    initial_load_model_only: bool = True
    """Take only the weights from `initial_load_path`. Else the optimizer's state, the step and the
    place in the data come along."""

    exclude_from_loading: Names = Field(default=(), examples=[["optimizer", "lr_scheduler"]])
    """State to leave at its start although `initial_load_path` has it: any of `optimizer`,
    `lr_scheduler`, `dataloader`, `train_state`, `handlers`. Needs
    `initial_load_model_only = false`."""

    allow_rewind: bool = False
    """Resume from `load_step` although later checkpoints exist; those are moved aside."""

    allow_dataset_change: bool = False
    """Resume although the data files or the tokenizer differ from those the run was trained on. A
    part of the epoch is then read twice, and a part not at all; `data.restart` avoids that."""

    allow_low_disk: bool = False
    """Start, with a warning, although the disk has no room for the next checkpoint, in bytes or in
    files: for file systems that report it wrongly. A save that fails ends the run."""

    trust_path: bool = False
    """Use the checkpoint folder although every user of the machine may write to it."""


class ValidationSet(Section):
    """One dataset to validate on, a table `[[validation.sets]]`."""

    name: str
    """Name in metrics and messages: letters, digits, `.`, `_` and `-`."""

    dataset: str = "auto"
    """Kind of data, as `training.dataset`."""

    dataset_path: PathText | None = None
    """File, folder or glob to read, as `training.dataset_path`."""

    column: str | None = None
    """Field of a row that holds the text. Unset: `data.text_column`."""

    encoding: str | None = None
    """Encoding of text and JSON files. Unset: `data.encoding`."""

    document_separator: str | None = None
    """Text between two documents of a text file. Unset: `data.document_separator`."""

    subset: str | None = None
    """Subset of a Hugging Face dataset, as `data.subset`."""

    split: str | None = None
    """Split of a Hugging Face dataset. Unset: `validation`."""

    revision: str | None = None
    """Revision of a hub dataset, as `data.revision`."""

    streaming: bool = True
    """Stream a Hugging Face dataset, as `data.streaming`."""

    format: DataFormat | None = None
    """Content of a row, as `data.format`. Unset: `data.format`."""

    columns: dict[str, str] | None = None
    """Other names of columns and keys, as `data.columns`. Unset: `data.columns`."""

    roles: dict[str, str] | None = None
    """Other names of roles, as `data.roles`. Unset: `data.roles`."""


class Validation(Section):
    """Loss on data that are not trained on."""

    enable: bool = False
    """Measure the loss on data that are not trained on, during the run and at its end."""

    dataset: str | None = Field(default=None, examples=["c4_validation"])
    """Kind of data, as `training.dataset`, where there is one set. Metrics call it `validation`.
    Unset: `auto` for a path, but `c4_validation` for a folder of C4, and without a path."""

    dataset_path: PathText | None = Field(default=None, examples=["held_out.jsonl"])
    """File, folder or glob of the one set. Leave it unset when `validation.sets` names several."""

    column: str | None = Field(default=None, examples=["text"])
    """Field of a row that holds the text of the one set. Unset: `data.text_column`."""

    sets: Annotated[tuple[ValidationSet, ...], Field(strict=False)] = ()
    """Several sets, each with a loss of its own: a table `[[validation.sets]]` each."""

    freq: PositiveInt = 10
    """Steps between two validations. The last step of the run is always followed by one."""

    steps: int = Field(default=-1, ge=-1, le=2**63 - 1)
    """Most sequences of a set, in training steps: each stands for `training.global_batch_size`
    sequences, whatever the mesh. -1 takes the whole set."""

    local_batch_size: PositiveInt | None = Field(default=None, examples=[8])
    """Sequences per data-parallel rank in one forward; changes no loss. Unset:
    `training.local_batch_size`."""

    seq_len: PositiveInt | None = Field(default=None, examples=[2048])
    """Tokens per sequence. Unset: `training.seq_len`."""

    lanes: PositiveInt | None = None
    """Streams that a set is read in, each by one data-parallel rank; where sequences begin depends
    on it. Unset: as many as the data have parts, at least 8 and at most 64."""

    dataloader: Dataloader = Field(default_factory=Dataloader)
    """Reading processes, which live as long as one validation of one set."""


class Evaluation(Section):
    """Benchmarks of lm-eval, for which the extra `eval` is needed."""

    tasks: Names = Field(default=(), examples=[["hellaswag"]])
    """Tasks, groups or tags to measure the model on, during the run and at its end. Empty: none."""

    task_dir: PathText | None = Field(default=None, examples=["my_tasks"])
    """Folder of YAML files with tasks of your own, in lm-eval's format."""

    freq: PositiveInt | None = Field(default=None, examples=[1000])
    """Steps between two evaluations; the last step of the run is always followed by one. Unset:
    only that one."""

    num_fewshot: NonNegativeInt | None = Field(default=None, examples=[5])
    """Solved examples in each prompt. Unset: as many as each task says."""

    limit: PositiveInt | None = Field(default=None, examples=[100])
    """Only the first so many examples of each task. Unset: all."""

    batch_size: PositiveInt = 8
    """Requests per data-parallel rank in one forward; changes no figure."""

    apply_chat_template: bool = False
    """Put each request as a user's message, by the chat template of the tokenizer's folder."""


class Metrics(Section):
    """Logging."""

    log_freq: PositiveInt = 10
    """Steps between two logged lines."""

    peak_tflops: PositiveFloat | None = Field(default=None, examples=[989.0])
    """Peak of one device in TFLOP/s, dense, in the type that computes: what the model FLOPs
    utilisation (MFU) is a share of. Unset: the maker's bfloat16 figure, for devices that are in the
    table of `utils/device.py`; others have no MFU."""

    enable_tensorboard: bool = False
    """Write TensorBoard event files."""

    save_tb_folder: str = "tb"
    """Folder of the event files, below `job.dump_folder`; in it lies one with the name of the run's
    folder, which is the run's name in TensorBoard."""

    enable_wandb: bool = False
    """Log to Weights & Biases, too; needs the package `wandb`. WANDB_PROJECT, WANDB_TEAM,
    WANDB_RUN_NAME and WANDB_MODE say where and as what."""

    sinks: Names = Field(default=(), examples=[["my_sink"]])
    """Further places to log to, by the names that packages or modules of your own register
    (`torchtitan list sinks`); each has its settings in `[sinks.NAME]`."""

    save_for_all_ranks: bool = False
    """Every rank writes its own metrics, and event files in a folder `rank_N`; else rank 0 alone
    does."""

    slow_rank_ratio: Annotated[float, Field(ge=0)] = 2.0
    """Warn of a rank whose own time of a step, without waiting for others, is more than this times
    the median's, in three logged steps in a row; 0 measures no own times. Not on GPUs."""

    disable_color_printing: bool = False
    """Plain console output without colours or progress bar, as it is where there is no terminal.
    The environment variable NO_COLOR turns off colours alone."""


class Profiling(Section):
    """Profiler traces."""

    enable_profiling: bool = False
    """Write Chrome (Perfetto) traces of some steps."""

    save_traces_folder: str = "profile_trace"
    """Folder of the traces, below `job.dump_folder`."""

    profile_freq: PositiveInt = 10
    """Steps between the ends of two traces, and between two memory snapshots."""

    profiler_active: PositiveInt = 1
    """Steps in a trace."""

    profiler_warmup: NonNegativeInt = 3
    """Steps before a trace in which the profiler runs without recording."""

    enable_memory_snapshot: bool = False
    """Write snapshots of the GPU's memory, with the history of its blocks, each `profile_freq`
    steps and when memory runs out. CUDA only."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, below `job.dump_folder`."""


class Comm(Section):
    """Communication between processes."""

    mode: Literal["default", "fake_backend"] = "default"
    """`fake_backend` makes a dry run: one step as one rank (RANK) of WORLD_SIZE in this process, on
    tensors without memory and without communication, to find what would fail at scale."""

    init_timeout_seconds: PositiveInt = 300
    """Seconds that a collective may take before the first step has been trained."""

    train_timeout_seconds: PositiveInt = 100
    """Seconds that a collective may take after the first step; a lost rank is noticed by then."""

    watchdog: bool = True
    """Let a small process beside each rank end it when it is stuck. False for work with pdb."""

    trace_buf_size: Annotated[int, Field(ge=0, le=MAX_TRACE_ENTRIES)] = 20000
    """Newest collectives that each rank remembers, to be written when one of them times out or
    fails; 0 remembers none."""

    save_traces_folder: str = "comm_traces"
    """Folder of these records, below `job.dump_folder`."""

    save_traces_file_prefix: str = "rank_"
    """Prefix of their file names; the rank follows."""


class Debug(Section):
    """Seed, determinism, process set-up."""

    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order of the data. The same on every mesh."""

    deterministic: bool = False
    """Use deterministic algorithms only (slower on GPUs)."""

    deterministic_warn_only: bool = False
    """With `deterministic`: warn about operations that have no deterministic form, do not fail."""

    record_tensors: PathText | None = Field(default=None, examples=["recorded"])
    """Folder for every tensor of the last step, number `training.steps`, in full: what modules
    return, gradients, parameters. `torchtitan bisect` compares two of them."""

    record: NonNegativeInt = 0
    """Steps between two records of the loss, the gradient norm and a digest of every gradient, with
    which `torchtitan replay RUN STEP` compares. 0: none."""

    cpu_allocator: Literal["tuned", "system"] = "tuned"
    """On the CPU, `tuned` raises glibc's mmap and trim thresholds, `system` leaves them alone."""

    threads: NonNegativeInt = 0
    """Threads of a process's CPU operators; 0 divides a machine's cores among its processes."""


class JobConfig(Section):
    """All settings of a run."""

    job: Job = Field(default_factory=Job)
    model: Model = Field(default_factory=Model)

    handlers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, examples=[{"lora": {"rank": 8}}]
    )
    """Settings of the model handlers, one table each; every handler checks its own."""

    training: Training = Field(default_factory=Training)
    data: Data = Field(default_factory=Data)
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    parallelism: Parallelism = Field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = Field(default_factory=ActivationCheckpoint)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    validation: Validation = Field(default_factory=Validation)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    metrics: Metrics = Field(default_factory=Metrics)

    sinks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, examples=[{"my_sink": {"folder": "logs"}}]
    )
    """Settings of the places in `metrics.sinks`, one table each; every sink checks its own."""

    profiling: Profiling = Field(default_factory=Profiling)
    comm: Comm = Field(default_factory=Comm)
    debug: Debug = Field(default_factory=Debug)
