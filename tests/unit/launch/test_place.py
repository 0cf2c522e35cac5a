"""The place of a process in a job that torchrun or srun started."""

from __future__ import annotations

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.place import adopt_slurm_ranks, check_variables, check_world_size, first_host, under_launcher

SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}


def test_srun_ranks_get_torchruns_variables() -> None:
    adopted = adopt_slurm_ranks({**SLURM, "SLURM_JOB_NODELIST": "gpu[07-10]"})
    assert adopted == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20077",
    }
    assert under_launcher(adopted)
    check_variables(adopted)
    own = {**SLURM, "SLURM_JOB_NODELIST": "a,b", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert (adopt_slurm_ranks(own)["MASTER_ADDR"], adopt_slurm_ranks(own)["MASTER_PORT"]) == ("10.0.0.1", "1234")
    assert adopt_slurm_ranks({**SLURM, "RANK": "0"}) == {}  # torchrun under srun
    assert adopt_slurm_ranks({**SLURM, "SLURM_NTASKS": "1"}) == {}
    assert not under_launcher({})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[12,07-09]", "gpu12"),
        ("rack[2-3]-node[01-08]", "rack2-node01"),
        ("n[1-2].cluster,x", "n1.cluster"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_ranks_that_cannot_find_each_other_are_told_what_is_missing() -> None:
    with pytest.raises(LaunchError, match="8 processes were started, and MASTER_ADDR is not set"):
        check_variables(adopt_slurm_ranks(SLURM))


def test_another_number_of_processes_is_refused() -> None:
    check_world_size(8, adopt_slurm_ranks(SLURM))
    check_world_size(1, {})
    with pytest.raises(LaunchError, match="asks for 4 processes, 8 processes started"):
        check_world_size(4, adopt_slurm_ranks(SLURM))
