"""What the checkpoint tests run on every rank: a small sharded model that trains, saves, loads."""

import ast
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.checkpoint.store import CheckpointStore, VerifiedStep
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext

RUN_ID = "abc123"


class Trainer:
    """A model whose shards are uneven (and, on four ranks, partly empty), with its optimizer.

    `cut`: "shard" (FSDP2), "hybrid" (two copies of shards), "tensor" (a matrix cut over two ranks,
    and FSDP2 over that) or "copy" (whole on every rank).
    """

    def __init__(self, world: DistributedContext, seed: int = 0, cut: str = "shard"):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
        size = world.world_size
        sizes, names = {
            "hybrid": ((2, size // 2), ("copy", "shard")),
            "tensor": ((size // 2, 2), ("shard", "tensor")),
        }.get(cut, ((size,), ("shard",)))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        if cut == "tensor":
            by_rows = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(self.model[0], mesh["tensor"], by_rows)
            mesh = mesh["shard"]
        for part in (*self.model, self.model) if cut != "copy" else ():
            fully_shard(part, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def train_step(self, step: int) -> None:
        """The same global batch on every rank, so that the mesh does not matter."""
        generator = torch.Generator().manual_seed(step)
        loss = self.model(torch.randn(4, 7, generator=generator)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        model = model_tensors([self.model])
        return {**model, **optimizer_tensors([self.model], [self.optimizer])}

    def content(self) -> dict[str, str]:
        """Digest of every whole tensor by name; collective."""
        return {name: digest(tensor) for name, tensor in self.tensors().items()}


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    as_bytes = whole.detach().flatten().view(torch.uint8)  # numpy knows no bfloat16
    return hashlib.sha256(as_bytes.numpy().tobytes()).hexdigest()


def make_store(
    world: DistributedContext,
    folder: str,
    run_id: str = RUN_ID,
    on_site: Any = None,
    save_timeout_seconds: float = 300,
    **section: Any,
) -> CheckpointStore:
    extra = {} if on_site is None else {"on_site": on_site}
    return CheckpointStore(
        Checkpoint(enable=True, **section),
        Path(folder),
        world,
        {"run_id": run_id, "config": {"a": 1}},
        save_timeout_seconds=save_timeout_seconds,  # type: ignore[arg-type]
        **extra,
    )


def find(store: CheckpointStore) -> VerifiedStep | None:
    """The step that a run would continue from."""
    return CheckpointManager(store.section, store, store.world).found


def save_steps(
    world: DistributedContext, folder: str, steps: int, section: dict[str, Any] | None = None
) -> dict[int, dict[str, str]]:
    """Train and save every step; returns the content of each."""
    trainer, store = Trainer(world), make_store(world, folder, **(section or {}))
    contents = {}
    for step in range(1, steps + 1):
        trainer.train_step(step)
        store.save(step, trainer.tensors(), {"step": step, "lanes": {"0": [1, 2.5, None]}})
        contents[step] = trainer.content()
    return contents


def recover(
    world: DistributedContext,
    folder: str,
    load_step: int = -1,
    section: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Find and load as a restarted job would. `untouched` says whether a failed one left the model
    alone."""
    trainer = Trainer(world, seed=7)
    before = trainer.content()
    try:
        store = make_store(world, folder, load_step=load_step, **(section or {}))
        manager = CheckpointManager(store.section, store, world)
        found = manager.found
        if found is None:
            return {"step": None}
        state = store.load(found, trainer.tensors())
        manager.begin()
    except CheckpointError as error:
        return {"error": str(error), "untouched": trainer.content() == before}
    steps = store.steps()
    return {"step": found.step, "state": state, "content": trainer.content(), "steps": steps}


def save_and_die(world: DistributedContext, folder: str, site: str, victim: int) -> None:
    """Save step 1 and 2, then kill this process at `site` of step 3."""

    def on_site(name: str, step: int) -> None:
        if (name, step, world.rank) == (site, 3, victim):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(world)
    store = make_store(world, folder, on_site=on_site, keep_latest_k=2)
    for step in (1, 2, 3):
        trainer.train_step(step)
        store.save(step, trainer.tensors(), {"step": step})
        content = trainer.content()
        if world.is_main:
            note(folder, "ack", step, content)


def note(folder: str, kind: str, step: int, content: dict[str, str]) -> None:
    """Leave the content of a step for `noted`, whole or not at all: this process may be killed at
    any time, its pool does that when another rank dies."""
    unfinished = Path(folder, f".note-{kind}-{step}")
    unfinished.write_text(repr(content))
    unfinished.rename(Path(folder, f"{kind}-{step}"))


def noted(folder: Path, kind: str) -> dict[int, dict[str, str]]:
    """The contents that were noted, by step."""
    paths = folder.glob(f"{kind}-*")
    return {int(p.name.rpartition("-")[2]): ast.literal_eval(p.read_text()) for p in paths}
