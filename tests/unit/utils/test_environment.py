"""The launcher's variables: consistent, or refused together."""

import pytest

from torchtitan.utils.environment import (
    EnvironmentFaults,
    ProcessEnvironment,
    is_quiet_rank,
    is_restart,
    read_environment,
    read_place,
    read_world_size,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_no_launcher_is_one_process():
    assert read_environment({}) == ProcessEnvironment(0, 1, 0, 1, launched=False)
    assert not read_environment({"WORLD_SIZE": "1"}).launched


def test_torchrun():
    expected = ProcessEnvironment(5, 8, 1, 4, launched=True)
    assert read_environment(TORCHRUN) == expected


def test_torchrun_with_one_process_has_a_rendezvous_to_join():
    one = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_environment(one).launched


@pytest.mark.parametrize(
    ("change", "variable", "words"),
    [
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE", "not an integer"),
        ({"WORLD_SIZE": "8.0"}, "WORLD_SIZE", "not an integer"),
        ({"WORLD_SIZE": "--8"}, "WORLD_SIZE", "not an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE", "at least 1"),
        ({"RANK": "-1"}, "RANK", "at least 0"),
        ({"RANK": "8"}, "RANK", "below WORLD_SIZE = 8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK", "below LOCAL_WORLD_SIZE = 4"),
        ({"RANK": ""}, "RANK", "missing"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE", "missing"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK", "missing"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR", "missing although RANK"),
        ({"MASTER_PORT": ""}, "MASTER_PORT", "missing"),
    ],
)
def test_contradictions(change: dict[str, str], variable: str, words: str):
    with pytest.raises(EnvironmentFaults) as caught:
        read_environment(TORCHRUN | change)
    faults = {fault.variable: fault for fault in caught.value.faults}
    assert words in faults[variable].problem
    assert "torchrun" in faults[variable].fix


def test_world_size_alone_is_enough_to_check_a_config():
    assert read_world_size({"WORLD_SIZE": "512"}) == 512
    assert read_world_size({}) == 1
    with pytest.raises(EnvironmentFaults):
        read_world_size({"WORLD_SIZE": "many"})


def test_only_rank_0_speaks():
    assert not is_quiet_rank({})
    assert not is_quiet_rank(TORCHRUN | {"RANK": "0"})
    assert is_quiet_rank(TORCHRUN | {"RANK": "3"})


def test_a_rank_without_others_speaks_for_itself():
    assert not is_quiet_rank({"RANK": "3", "WORLD_SIZE": "8"})


def test_place_needs_no_launcher():
    assert read_place({}) == ProcessEnvironment()
    place = read_place({"RANK": "200", "WORLD_SIZE": "512"})
    assert (place.rank, place.world_size, place.launched) == (200, 512, False)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"RANK": "1"}, "RANK"),
        ({"RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ],
)
def test_a_place_that_does_not_exist(environ: dict[str, str], variable: str):
    with pytest.raises(EnvironmentFaults) as caught:
        read_place(environ)
    assert [fault.variable for fault in caught.value.faults] == [variable]


def test_a_place_beyond_the_last():
    with pytest.raises(EnvironmentFaults) as caught:
        read_place({"RANK": "8", "WORLD_SIZE": "8"})
    (fault,) = caught.value.faults
    assert (fault.variable, fault.fix) == ("RANK", "set it to 0 up to 7")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": ""}, False),
    ],
)
def test_restart(environ: dict[str, str], expected: bool):
    assert is_restart(environ) is expected
