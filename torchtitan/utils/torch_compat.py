"""Hide the differences between the supported torch versions (2.11 and newer).

Each name is private, or moved, in some of them. Private names that are the same in all of them are
used where they are needed: `_StridedShard` (initialisation), `_StorageInfo` (checkpoint reader).
"""

import csv
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor


def apply_replicate(
    modules: list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy
) -> None:
    """Apply composable `replicate` over a 1-D mesh: DDP with FSDP2's hooks and precision.

    Modules that share a parameter (tied weights) must come in one call.
    """
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(modules if len(modules) > 1 else modules[0], mesh=mesh, mp_policy=policy)


def all_gather_single(output: Tensor, value: Tensor, group: dist.ProcessGroup) -> None:
    """Concatenate every rank's `value` (the same shape on all) into `output`."""
    # Its name since 2.13; the older one warns there.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, value, group=group)


def reduce_scatter_single(output: Tensor, value: Tensor, group: dist.ProcessGroup) -> None:
    """Sum `value` over ranks; `output` is this rank's of the equal parts along its dimension 0."""
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, value, group=group)


def hide_worker_info() -> None:
    """Make `get_worker_info` say that this process is no data worker."""
    import torch.utils.data._utils.worker as worker

    worker._worker_info = None


def enable_async_tensor_parallel(group_name: str) -> None:
    """Have the compiler overlap this group's collectives with the matrix products beside them.

    CUDA only: tests run the fused graph, but with stand-ins for its kernels."""
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # 2.13 calls it needless, but its compiler still passes over groups that were not enabled.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group_name)


OWN_TIMEOUT = "keeps its own time limit"
"""Description of process groups that `set_group_timeouts` passes over."""


def set_group_timeouts(timeout: timedelta) -> None:
    """Set the timeout of every process group, except those of `OWN_TIMEOUT`."""
    module: Any = dist.distributed_c10d
    for group in list(module._world.pg_map):
        if group.group_desc != OWN_TIMEOUT:
            module._set_pg_timeout(timeout, group)


def group_timeout(group: dist.ProcessGroup) -> float:
    """Return the seconds that a collective of a gloo group may take."""
    options: Any = group._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """Return a tensor like `tensor`, a DTensor perhaps, whose data on this rank are `local`.

    Unlike `DTensor.from_local` this leaves `local` on its device, whatever the mesh's is.
    """
    if not isinstance(tensor, DTensor):
        return local
    make: Any = DTensor
    return make(local, tensor._spec, requires_grad=False)


class PipelineSchedule(Protocol):
    """The part of torch's pipeline schedules that is used."""

    def step(
        self, *args: Tensor, target: Tensor, losses: list[Tensor], **kwargs: Tensor | bool
    ) -> Any:
        """Forward and backward of all microbatches; fills `losses` where the last stage is."""


def build_pipeline_schedule(
    name: str,
    csv_file: str,
    stages: list[Any],
    num_microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> PipelineSchedule:
    """Return the pipeline schedule of this name, or the one in `csv_file` unless that is "".

    `stages` are this rank's `PipelineStage`s. Gradients are summed over microbatches.
    """
    from torch.distributed.pipelining import schedules

    # When a step fails it would print the whole schedule, on every rank.
    schedules.logger.setLevel(logging.CRITICAL)
    for stage in stages:
        stage._get_init_p2p_neighbors_ops = partial(
            _to_other_ranks, stage._get_init_p2p_neighbors_ops, stage.group_rank
        )
    if csv_file:
        runtime: Any = schedules._PipelineScheduleRuntime
        schedule = runtime(stages, num_microbatches, loss_fn=loss, scale_grads=False)
        schedule._load_csv(csv_file, "compute_only")
        return schedule
    kind = schedules.get_schedule_class(name)
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    return kind(stages[0] if single else stages, num_microbatches, loss_fn=loss, scale_grads=False)


def require_runnable_schedule(csv_file: str, num_microbatches: int) -> None:
    """Raise ValueError unless the schedule of `csv_file` trains each microbatch once.

    Also if a rank would wait forever.
    """
    from torch.distributed.pipelining import schedules

    with open(csv_file, newline="") as file:
        rows = [[schedules._Action.from_str(cell) for cell in row] for row in csv.reader(file)]
    order: Any = {rank: [action for action in row if action] for rank, row in enumerate(rows)}
    actions = [
        sub for row in order.values() for action in row for sub in action.sub_actions or [action]
    ]
    num_stages = 1 + max(action.stage_index for action in actions)
    B, F, W = schedules.B, schedules.F, schedules.W
    # torch counts what is in sets for each stage, and finds a microbatch's loss by its place.
    done = set()
    for stage, kind, microbatch, *_ in actions:
        if microbatch >= num_microbatches:
            raise ValueError(
                f"microbatch {microbatch} is more than {num_microbatches - 1}, the last"
            )
        work = stage, B if kind == W else kind, microbatch
        if work in done:
            phase = "forwards" if kind == F else "backwards"
            raise ValueError(f"stage {stage} has two {phase} of microbatch {microbatch}")
        done.add(work)
    last = [index for stage, kind, index, *_ in actions if (stage, kind) == (num_stages - 1, F)]
    if last != sorted(last):
        raise ValueError("the last stage's forwards are not in the order of the microbatches")
    try:
        stage_to_rank = schedules._validate_schedule(
            order, len(order), num_stages, num_microbatches
        )
        schedules._add_send_recv(order, stage_to_rank.__getitem__, num_stages)
    except AssertionError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def before_stage_forward(stage: Any, action: Callable[[int], None]) -> None:
    """Call `action` with the microbatch's number before each forward of a pipeline stage."""
    forward = stage.forward_one_chunk

    def forward_one_chunk(index: int, *args: Any, **kwargs: Any) -> Any:
        action(index)
        return forward(index, *args, **kwargs)

    stage.forward_one_chunk = forward_one_chunk


def _to_other_ranks(greetings: Callable[[], list[dist.P2POp]], rank: int) -> list[dist.P2POp]:
    """Return the greetings to other ranks.

    Before the first step torch 2.11 connects neighbouring stages, also two on the same rank (at the
    tip of a V), which gloo cannot.
    """
    return [greeting for greeting in greetings() if greeting.group_peer != rank]


@contextmanager
def observe_waits(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """While entered, call `before` and `after` each wait of this thread for a collective over gloo.

    A wait that fails has no `after`. Each way to wait ends in `Work.wait` or in the operator
    `wait_tensor`, that of compiled code too.
    """
    operator: Any = torch.ops._c10d_functional.wait_tensor.default
    # The same kernel as for the CPU, which is replaced. Unlike a kernel that is called by itself,
    # an operator lets other threads run meanwhile; gloo's may need the interpreter, too.
    keys: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    thread, wait = threading.get_ident(), dist.Work.wait

    def observed(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return action(*args, **kwargs)
            before()
            result = action(*args, **kwargs)
            after()
            return result

        return act

    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl("wait_tensor", observed(lambda x: operator.redispatch(keys, x)), "CPU")
    dist.Work.wait = observed(wait)  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        library._destroy()


def gloo_trace() -> list[dict[str, Any]] | None:
    """Return the newest collectives over gloo, oldest first; None if torch does not record them."""
    import torch._C._distributed_c10d as c10d

    dump: Any = getattr(c10d, "_dump_fr_trace_json", None)
    return None if dump is None else json.loads(dump()).get("entries", [])


def nccl_trace() -> bytes:
    """Return the newest collectives over NCCL, for torch's analyser of flight recorders.

    Not run by a test: it needs CUDA.
    """
    import torch._C._distributed_c10d as c10d

    dump: Any = c10d._dump_nccl_trace  # type: ignore[attr-defined, unused-ignore]
    return dump()


def ranks_of_groups() -> dict[str, list[int]]:
    """Return the ranks of each process group, by its name."""
    module: Any = dist.distributed_c10d
    groups = list(module._world.pg_map)
    return {group.group_name: dist.get_process_group_ranks(group) for group in groups}


_TIMED_OUT = ("Timed out waiting", "timeout caused pair closure", "Watchdog caught collective")
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def lost_contact(error: BaseException) -> str:
    """Return "timeout" or "closed" if a rank did not answer, or closed the connection; else "".

    gloo and NCCL say so in their texts only; causes of `error` are searched, too.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and any(words in text for words in _TIMED_OUT):
        return "timeout"
    if isinstance(error, RuntimeError) and any(words in text for words in _CLOSED):
        return "closed"
    return "" if error.__cause__ is None else lost_contact(error.__cause__)
