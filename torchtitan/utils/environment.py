"""Read the launcher's variables of this process, once. No torch.

`torchrun` starts one process per device and gives each its place in `RANK`, `WORLD_SIZE`,
`LOCAL_RANK` and others. Half-set variables make processes wait for each other forever, so they are
checked together before anything is joined.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

_HINT = "launch with torchrun, which sets all of them, or unset them to run one process"
_RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class EnvironmentFault:
    """A variable that is missing or makes no sense; `value` is None when it is not set."""

    variable: str
    value: str | None
    problem: str
    fix: str = _HINT

    @property
    def name(self) -> str:
        """Return the variable with its value, if it is set."""
        return self.variable if self.value is None else f"{self.variable} = {self.value}"


class EnvironmentFaults(ValueError):
    """Variables of the launcher that contradict each other."""

    def __init__(self, faults: list[EnvironmentFault]):
        self.faults = faults
        super().__init__("; ".join(f"{fault.variable}: {fault.problem}" for fault in faults))


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of this process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """A launcher started this process, so there is a rendezvous to join."""


def read_environment(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
    """Return the place of this process; raise `EnvironmentFaults` with everything wrong."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world_size, local_rank, local_world_size = _read(environ, *variables)
    launched = bool(environ.get("RANK")) or world_size > 1
    place = ProcessEnvironment(rank, world_size, local_rank, local_world_size, launched)
    if launched and (faults := _contradictions(environ, place)):
        raise EnvironmentFaults(faults)
    return place


def read_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return `WORLD_SIZE`, for looking at a config from outside a run; 1 when unset."""
    return _read(environ, "WORLD_SIZE")[0]


def read_place(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
    """Return `RANK` (0 when unset) of `WORLD_SIZE`, for a dry run as one rank.

    Raises:
        EnvironmentFaults: the rank is not below the world size.
    """
    rank, world_size = _read(environ, "RANK", "WORLD_SIZE")
    if rank >= world_size:
        fix = f"set it to 0 up to {world_size - 1}"
        raise EnvironmentFaults([_rank_too_high(rank, world_size, fix)])
    return ProcessEnvironment(rank, world_size)


def is_quiet_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether rank 0 reports issues for this process; False without `MASTER_ADDR`."""
    launched = bool(environ.get("MASTER_ADDR", "").strip())
    return launched and environ.get("RANK", "0").strip() not in ("", "0")


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is a restart: a job that Slurm requeued, or processes of torchrun."""
    counts = (environ.get(name, "").strip() for name in _RESTART_COUNTS)
    return any(re.fullmatch(r"[0-9]+", count) and int(count) > 0 for count in counts)


@dataclass(frozen=True)
class WandbEnvironment:
    """Variables of wandb; None and "" where nothing is set."""

    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    run_id: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()


def read_wandb(environ: Mapping[str, str] = os.environ) -> WandbEnvironment:
    """Return wandb's variables, by TorchTitan's names for them and by wandb's own."""

    def first(*names: str) -> str | None:
        values = (environ.get(name, "").strip() for name in names)
        return next((value for value in values if value), None)

    tags = first("WANDB_RUN_TAGS", "WANDB_TAGS") or ""
    return WandbEnvironment(
        mode=first("WANDB_MODE"),
        project=first("WANDB_PROJECT"),
        entity=first("WANDB_TEAM", "WANDB_ENTITY"),
        name=first("WANDB_RUN_NAME", "WANDB_NAME"),
        run_id=first("WANDB_RUN_ID"),
        group=first("WANDB_RUN_GROUP"),
        job_type=first("WANDB_RUN_JOB_TYPE", "WANDB_JOB_TYPE"),
        notes=first("WANDB_RUN_NOTES", "WANDB_NOTES"),
        tags=tuple(tag.strip() for tag in tags.split(",") if tag.strip()),
    )


def guess_device_type() -> str:
    """Return "cuda" when the machine seems to have a usable GPU, else "cpu", by its device files.

    The exact answer needs torch; this one is for checks that must answer before torch is imported.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return "cpu"
    return "cuda" if any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/kfd")) else "cpu"


def _read(environ: Mapping[str, str], *variables: str) -> list[int]:
    """Return variables as integers: sizes are 1 or more, and 1 if unset; ranks start at 0."""
    values, faults = [], []
    for variable in variables:
        text = environ.get(variable, "").strip()
        least = 1 if variable.endswith("SIZE") else 0
        values.append(int(text) if re.fullmatch(r"-?[0-9]+", text) else least)
        if text and not re.fullmatch(r"-?[0-9]+", text):
            faults.append(EnvironmentFault(variable, text, "is not an integer"))
        elif values[-1] < least:
            faults.append(EnvironmentFault(variable, text, f"must be at least {least}"))
    if faults:
        raise EnvironmentFaults(faults)
    return values


def _contradictions(
    environ: Mapping[str, str], place: ProcessEnvironment
) -> list[EnvironmentFault]:
    faults = []
    needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    if place.world_size > 1:
        needed.append("LOCAL_RANK")
    for variable in needed:
        if not environ.get(variable, "").strip():
            others = ", ".join(name for name in needed if environ.get(name))
            faults.append(EnvironmentFault(variable, None, f"is missing although {others} is set"))
    if place.rank >= place.world_size:
        faults.append(_rank_too_high(place.rank, place.world_size))
    if environ.get("LOCAL_WORLD_SIZE") and place.local_rank >= place.local_world_size:
        problem = f"must be below LOCAL_WORLD_SIZE = {place.local_world_size}"
        faults.append(EnvironmentFault("LOCAL_RANK", str(place.local_rank), problem))
    return faults


def _rank_too_high(rank: int, world_size: int, fix: str = _HINT) -> EnvironmentFault:
    problem = f"must be below WORLD_SIZE = {world_size}"
    return EnvironmentFault("RANK", str(rank), problem, fix)


# A place as srun, Open MPI or MPICH give it. Without this each process that they start would train
# alone. Slurm's variables of a *step* count: `SLURM_NTASKS` is also set in the shell of sbatch.

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


def adopt_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torchrun from those of srun or mpirun.

    Does nothing where `RANK` or `WORLD_SIZE` is set already.

    Raises:
        EnvironmentFaults: a launcher has started several processes, but does not say enough to join
            them.
    """
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


def is_torchrun_s(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environ


def _place(environ: Mapping[str, str], launcher: _Launcher) -> dict[str, str | int] | None:
    """Return the variables of torchrun; None if the launcher's are not complete."""
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
    """Return the first name of a Slurm list such as `node[03-07,9],login1`."""
    first = re.split(r",(?![^\[]*\])", machines)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _number(environ: Mapping[str, str], variable: str) -> int | None:
    text = environ.get(variable, "").strip()
    return int(text) if re.fullmatch(r"[0-9]+", text) else None


def wants_color(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a terminal may get colours: `NO_COLOR` is unset, `TERM` is not `dumb`."""
    return not environ.get("NO_COLOR") and not is_dumb_terminal(environ)


def is_dumb_terminal(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the terminal can neither colour text nor draw over it."""
    return environ.get("TERM", "").lower() in ("dumb", "unknown")  # as rich decides
