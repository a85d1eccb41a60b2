"""What differs between the torch versions that are supported (2.11 and newer), in one place.

Each name is private, or moved, in some of them. Private names that are the same in all of them are
used where they are needed: `_StridedShard` (initialisation), `_StorageInfo` (checkpoint reader).
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy


def apply_replicate(
    modules: list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy
) -> None:
    """torch's composable `replicate` over a 1-D mesh: DDP with FSDP2's hooks and precision.

    Modules that share a parameter (tied weights) must come in one call.
    """
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(modules if len(modules) > 1 else modules[0], mesh=mesh, mp_policy=policy)


def all_gather_single(output: Tensor, value: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `value` (the same shape on all), concatenated into `output`."""
    # Its name since 2.13; the older one warns there.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, value, group=group)


def set_group_timeouts(timeout: timedelta) -> None:
    """Bound every collective of every process group from now on."""
    module: Any = dist.distributed_c10d
    for group in list(module._world.pg_map):
        module._set_pg_timeout(timeout, group)
