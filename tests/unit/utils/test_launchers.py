"""The place of a process that srun or mpirun started."""

import pytest

from torchtitan.utils.environment import (
    EnvironmentFaults,
    ProcessEnvironment,
    adopt_place,
    first_host,
    read_environment,
)

BATCH_SHELL = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
}
SRUN = BATCH_SHELL | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "rack[2-3]node[07,09]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "4,5,6,7",
}
OPEN_MPI = {  # as mpirun 5.0.11 sets them
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-25496@1",
    "PMIX_RANK": "1",
}
ALONE = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}
MPICH = {  # as mpiexec (Hydra) 5.0.1 sets them
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "PMI_FD": "11",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29400",
}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    environ = dict(environ)
    adopt_place(environ)
    return environ


@pytest.mark.parametrize(
    ("environ", "place", "address"),
    [
        (SRUN, ProcessEnvironment(5, 8, 1, 4, True), "rack2node07"),
        (OPEN_MPI, ProcessEnvironment(1, 2, 1, 2, True), "localhost"),
        (MPICH, ProcessEnvironment(1, 2, 1, 2, True), "localhost"),
        # Of mpirun's daemons, which srun has started.
        (SRUN | OPEN_MPI, ProcessEnvironment(1, 2, 1, 2, True), "localhost"),
        # Of srun --mpi=pmi2.
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, ProcessEnvironment(5, 8, 1, 4, True), None),
        # Of a shell that mpirun -n 1 has started.
        (
            SRUN | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
            ProcessEnvironment(5, 8, 1, 4, True),
            None,
        ),
    ],
    ids=["srun", "open-mpi", "mpich", "mpirun-in-slurm", "srun-pmi2", "srun-in-mpirun"],
)
def test_place_of_each_launcher(
    environ: dict[str, str], place: ProcessEnvironment, address: str | None
) -> None:
    found = adopted(environ)
    assert read_environment(found) == place
    assert address in (None, found["MASTER_ADDR"])


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SHELL,
        SRUN | TORCHRUN,
        OPEN_MPI | TORCHRUN,
        SRUN | {"WORLD_SIZE": "1"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_GTIDS": "0", "SLURM_PROCID": "0"},
    ],
    ids=["none", "sbatch", "torchrun-in-srun", "torchrun-in-mpirun", "alone", "one-task"],
)
def test_nothing_is_taken_from_what_is_no_launcher_of_ranks(environ: dict[str, str]) -> None:
    assert adopted(environ) == environ


def test_port_is_the_job_s_own_and_the_same_on_all_its_ranks() -> None:
    first, second = adopted(SRUN), adopted(SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2"})
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert 1024 < int(first["MASTER_PORT"]) < 32768  # not of the range for outgoing connections
    assert adopted(SRUN | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != first["MASTER_PORT"]
    assert adopted(OPEN_MPI)["MASTER_PORT"] != adopted(MPICH)["MASTER_PORT"]


def test_an_address_that_is_set_is_kept() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
    assert given.items() <= adopted(SRUN | given).items()


def test_a_process_that_sees_one_device_uses_it() -> None:
    """As with srun --gpus-per-task=1."""
    assert adopted(SRUN | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert adopted(SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("environ", "variable", "problem"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR", "Open MPI started"),
        (SRUN | {"SLURM_HET_SIZE": "2"}, "MASTER_ADDR", "Slurm started"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE", "MPI_LOCALRANKID"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ],
    ids=["two-machines", "heterogeneous", "no-local-rank", "no-rank"],
)
def test_what_cannot_be_joined_is_refused(
    environ: dict[str, str], variable: str, problem: str
) -> None:
    with pytest.raises(EnvironmentFaults) as caught:
        adopt_place(environ)
    (fault,) = caught.value.faults
    assert fault.variable == variable and problem in fault.problem
    assert "torchrun" in fault.fix and "WORLD_SIZE=1" in fault.fix


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("node7", "node7"),
        ("login1,node[3-4]", "login1"),
        ("node[03-07,9],login1", "node03"),
        ("a[1,3]b[2-4]c,z", "a1b2c"),
        ("10.0.0.[5-9]", "10.0.0.5"),
    ],
)
def test_first_host(machines: str, first: str) -> None:
    assert first_host(machines) == first
