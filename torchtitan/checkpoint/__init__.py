"""Saving and resuming.

`torch.distributed.checkpoint` reads and writes the tensors; this package decides around it. Two
objects do the work: `manager.CheckpointManager` is the policy (when to save, what a checkpoint
holds, which step a run continues from) and `store.CheckpointStore` the mechanism (write, commit by
one rename, verify, load). `manifest` defines a valid checkpoint, `steps_folder` the names on disk,
`decision` what a second start in a run folder does. What `decision` and `run_folder` need imports
no torch.
"""
