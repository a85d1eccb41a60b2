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
        """Ranks over which FSDP shards a parameter: context parallelism's ranks hold the same
        parameters, so they share them out like the data ranks."""
        return self.dp_shard * self.cp

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of all axes, those of degree 1 too. All ranks must call it."""
        shape = tuple(getattr(self, axis) for axis in AXES)
        return init_device_mesh(device_type, shape, mesh_dim_names=AXES)

    def shard_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Of `mesh`, the axis that parameters are sharded over: dp_shard and cp as one."""
        if self.cp == 1:
            return mesh["dp_shard"]
        return mesh["dp_shard", "cp"]._flatten("dp_shard_cp")

    def dp_rank(self, rank: int) -> int:
        """Which part of the data the process of this rank reads, 0 to `dp` - 1."""
        return rank // (self.cp * self.tp) % self.dp

    def is_data_leader(self, rank: int) -> bool:
        """Whether this rank speaks for its data where every datum must count once."""
        return rank % (self.cp * self.tp) == 0 and rank < self.world_size // self.pp

    def is_loss_leader(self, rank: int) -> bool:
        """Whether the loss that this rank computes is to be added to the other ranks': those that
        only differ in tp compute the same one."""
        return rank % self.tp == 0

    def describe(self) -> str:
        """Degrees above 1, for the log."""
        above = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ", ".join(above) or "one process"
