"""Saving and resuming: what makes a checkpoint one, and which one a run continues from.

`torch.distributed.checkpoint` reads and writes the tensors; this package is the policy around it.
Read `manifest` (what a checkpoint is), `checkpointer` (how one appears, and how one is chosen),
`steps_folder` (what is kept), then `decision` (what a second start in the same folder does).
Nothing here imports torch except `checkpointer`, `state` and `dcp_io`.
"""
