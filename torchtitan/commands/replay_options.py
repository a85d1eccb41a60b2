"""The arguments of `replay`. No torch."""

import argparse

from torchtitan.commands.generation_options import positive


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """Repeat a step of a run, and compare it with what the run recorded.

    The run continues in a temporary folder from its newest checkpoint before STEP, and ends with
    STEP; RUN is not changed. Loss, gradient norm and a digest of every gradient are compared: on
    the same mesh they are equal bit for bit, on another one to rounding, with the bound printed.
    What is compared is what `debug.record` has recorded, or else what metrics.jsonl holds.

    Settings, `--section.key value`, change what is run; modules that the run imported have to be
    named again, with `--job.custom_import`, as a stored config executes nothing. The exit status
    is 0 if the step is the same, 1 if it differs, and that of `train` if it cannot be trained.
    """
    parser.add_argument("run", metavar="RUN", help="a run's folder, job.dump_folder")
    parser.add_argument("step", metavar="STEP", type=positive, help="the step to repeat")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        type=mesh_degrees,
        help="degrees of pp, dp_replicate, dp_shard, cp and tp; those left out are 1 (default: the"
        " run's mesh). As many processes are started on this machine",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="default: that of the run's config"
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="a new folder for config, metrics, record and ledger of the replay, which stays",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def mesh_degrees(text: str) -> dict[str, int]:
    """Read `AXIS=N,...`."""
    pairs = [part.partition("=") for part in text.split(",")]
    return {axis.strip(): positive(degree) for axis, _, degree in pairs}
