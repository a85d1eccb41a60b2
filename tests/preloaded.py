"""Imports that the fork server makes once for its processes; see `tests/forked.py`.

Nothing that reads the environment when it is imported, as `datasets` does: a test may set it.
"""

import gc
import pkgutil
from importlib import import_module

import torchtitan

MODULES = [
    "torch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.utils.serialization",
    "tests.pool",
    "tests.forked",
    "tests.distributed.tiny",
]
for module in MODULES:
    import_module(module)
for found in pkgutil.walk_packages(torchtitan.__path__, "torchtitan."):
    if not found.name.endswith("__main__"):
        import_module(found.name)

# A process that collects garbage would walk through all of it, and get a copy of its own.
gc.collect()
gc.freeze()
