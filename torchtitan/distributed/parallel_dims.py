"""`ParallelDims`: the degree of every kind of parallelism, and the device mesh they span.

The axes, slowest varying first: pipeline stages (pp), copies of the model (dp_replicate), shards of
the parameters (dp_shard), parts of the sequence (cp), parts of single matrices (tp). Neighbouring
ranks communicate most, so tp comes last.
"""

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.schema import Parallelism

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelDims:
    """The degrees of a run; their product is the number of processes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def from_section(cls, section: Parallelism, world_size: int) -> "ParallelDims":
        """Return the degrees that a checked section means for this number of processes."""
        pp, cp, tp = (
            section.pipeline_parallel_degree,
            section.context_parallel_degree,
            section.tensor_parallel_degree,
        )
        replicate, shard = (
            section.data_parallel_replicate_degree,
            section.data_parallel_shard_degree,
        )
        if shard < 0:
            shard = world_size // (pp * replicate * cp * tp)
        dims = cls(pp, replicate, shard, cp, tp)
        assert dims.world_size == world_size, "the mesh was not checked"
        return dims

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold parts or copies of the same parameters."""
        return self.world_size // self.pp

    @property
    def shards(self) -> int:
        """Ranks over which FSDP shards a parameter.

        Context-parallel ranks use the same parameters, so they shard them like data ranks.
        """
        return self.dp_shard * self.cp

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """Return the mesh of all axes, including those of degree 1. All ranks must call it."""
        shape = tuple(getattr(self, axis) for axis in AXES)
        return init_device_mesh(device_type, shape, mesh_dim_names=AXES)

    def shard_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the axis of `mesh` that FSDP shards over: dp_shard and cp as one."""
        if self.cp == 1:
            return mesh["dp_shard"]
        return mesh["dp_shard", "cp"]._flatten("dp_shard_cp")

    def dp_rank(self, rank: int) -> int:
        """Return the share of the data that this rank reads, from 0 to `dp` - 1."""
        return rank // (self.cp * self.tp) % self.dp

    def is_data_leader(self, rank: int) -> bool:
        """Return True on one rank of each data replica: its samples are counted."""
        return rank % (self.cp * self.tp) == 0 and rank < self.world_size // self.pp

    def is_loss_leader(self, rank: int) -> bool:
        """Return True on the ranks whose losses are added; along tp all compute the same."""
        return rank % self.tp == 0

    def describe(self) -> str:
        """Return the degrees above 1, for the log."""
        above = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ", ".join(above) or "one process"
