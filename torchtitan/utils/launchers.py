"""A process's place as srun, Open MPI or MPICH give it, in the variables of torchrun. No torch.

Without this each process that they start would train alone. Slurm's variables of a *step* count:
`SLURM_NTASKS` is also set in the shell of sbatch and salloc, where it says nothing about this
process.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from torchtitan.utils.environment import EnvironmentFault, EnvironmentFaults

_DECIDED_BY_USER = ("RANK", "WORLD_SIZE")
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_DEFAULT_PORT = 29500
_ALONE = "or set WORLD_SIZE=1 if each process is to train alone"


@dataclass(frozen=True)
class _Launcher:
    """The variables that a launcher sets for each process."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]
    """Equal on all processes of one start, and different for the next one."""


_LAUNCHERS = (
    # mpirun may start its daemons with srun, and their processes inherit Slurm's variables. So
    # Slurm comes last.
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"),
    ),
    _Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_PORT",)),
    _Launcher(
        "Slurm",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_GTIDS",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


def adopt_place(environ: MutableMapping[str, str] | None = None) -> None:
    """Set `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`
    from the variables of srun or mpirun.

    Does nothing where `RANK` or `WORLD_SIZE` is set already. Raises `EnvironmentFaults` where a
    launcher has started several processes, but does not tell enough to join them.
    """
    environ = os.environ if environ is None else environ
    if any(environ.get(name, "").strip() for name in _DECIDED_BY_USER):
        return
    started = [launcher for launcher in _LAUNCHERS if (_number(environ, launcher.size) or 0) > 1]
    for launcher in started:
        place = _place(environ, launcher)
        if place is not None:
            environ.update({name: str(value) for name, value in place.items()})
            return
    if started:
        launcher = started[0]
        needed = f"{launcher.rank}, {launcher.local_rank} and {launcher.local_size}"
        problem = f"{launcher.name} started several processes, but {needed} are not all set"
        fix = f"launch with torchrun, {_ALONE}"
        raise EnvironmentFaults(
            [EnvironmentFault(launcher.size, environ[launcher.size], problem, fix)]
        )


def is_torchrun_s(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether torchrun started this process."""
    environ = os.environ if environ is None else environ
    return "TORCHELASTIC_RUN_ID" in environ


def _place(environ: Mapping[str, str], launcher: _Launcher) -> dict[str, str | int] | None:
    """The variables of torchrun; None if the launcher's are not complete."""
    size, rank = _number(environ, launcher.size), _number(environ, launcher.rank)
    local_rank = _number(environ, launcher.local_rank)
    if launcher.name == "Slurm":  # lists the ranks of this machine
        local_size = len([word for word in environ.get(launcher.local_size, "").split(",") if word])
    else:
        local_size = _number(environ, launcher.local_size) or 0
    if size is None or rank is None or local_rank is None or not local_size:
        return None
    if any(environ.get(name, "").strip().isdigit() for name in _VISIBLE_DEVICES):
        local_rank = 0  # each process sees one device only, its own
    job = ".".join(environ.get(name, "") for name in launcher.job).strip(".")
    port = 10000 + zlib.crc32(job.encode()) % 10000 if job else _DEFAULT_PORT
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": environ.get("MASTER_ADDR", "").strip()
        or _first_machine(environ, launcher, local_size == size),
        "MASTER_PORT": environ.get("MASTER_PORT", "").strip() or port,
    }


def _first_machine(environ: Mapping[str, str], launcher: _Launcher, only_one: bool) -> str:
    if only_one:
        return "localhost"
    machines = environ.get("SLURM_STEP_NODELIST", "")
    is_mixed = (_number(environ, "SLURM_HET_SIZE") or 1) > 1  # each part knows its own machines
    if launcher.name == "Slurm" and machines and not is_mixed:
        return first_host(machines)
    problem = f"is missing, and {launcher.name} started processes on several machines"
    fix = (
        "set it for all processes to the name of the machine of rank 0 (`export` before srun,"
        f" `mpirun -x MASTER_ADDR=...`), launch with torchrun, {_ALONE}"
    )
    raise EnvironmentFaults([EnvironmentFault("MASTER_ADDR", None, problem, fix)])


def first_host(machines: str) -> str:
    """The first name of a Slurm list such as `node[03-07,9],login1`."""
    first = re.split(r",(?![^\[]*\])", machines)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    text = environ.get(variable, "").strip()
    return int(text) if re.fullmatch(r"[0-9]+", text) else None
