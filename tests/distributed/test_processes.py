"""How several processes find each other."""

import threading

import numpy as np
import pytest

from llm3.distributed import processes
from llm3.distributed.processes import detect
from llm3.errors import Exit, UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
EXPLICIT = {"LLM3_COORDINATOR": "host:1234", "LLM3_PROCESSES": "2", "LLM3_PROCESS": "1"}


def test_without_flags_or_variables_a_process_is_alone():
    assert detect({}) is None
    assert processes.start() == "one process"


def test_a_batch_script_without_srun_is_alone():
    assert detect({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}) is None
    assert detect(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "found", "method"),
    [
        (SLURM, "SLURM: task 1 of 2 of job 7", "slurm"),
        (OMPI, "Open MPI: rank 3 of 4", "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU: worker 1 of 2", None),
        ({"LLM3_ACCELERATOR": "tpu"}, "TPU: by the metadata of the machine", None),
    ],
)
def test_a_scheduler_is_found_by_what_it_sets(environment, found, method):
    cluster = detect(environment)
    assert cluster.found == found
    assert cluster.arguments.get("cluster_detection_method") == method


def test_jax_knows_the_schedulers_by_these_names():
    from jax._src.clusters import ClusterEnv

    assert {"slurm", "ompi"} <= {each.name for each in ClusterEnv._cluster_types}


def test_an_address_in_the_environment_is_the_coordinator_of_a_scheduler():
    arguments = detect(SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}).arguments
    assert arguments["coordinator_address"] == "10.0.0.1:99"


def test_flags_come_before_variables_and_both_before_a_scheduler():
    expected = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
    expected["cluster_detection_method"] = "deactivate"
    assert detect(SLURM | EXPLICIT).arguments == expected
    assert detect(EXPLICIT, process=0).arguments == expected | {"process_id": 0}
    assert detect({}, "host:1234", 2, 1).arguments == expected


def test_one_process_is_alone_whatever_else_is_found():
    assert detect(SLURM, processes=1) is None
    assert detect(SLURM | {"LLM3_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"LLM3_COORDINATOR": None}, "^--coordinator: missing"),
        ({"LLM3_PROCESSES": None, "LLM3_PROCESS": None}, "^--processes and --process: missing"),
        ({"LLM3_PROCESS": "2"}, r"^--process=2: expected 0 to 1, for --processes=2"),
        ({"LLM3_PROCESSES": "two"}, "^LLM3_PROCESSES='two': expected a whole number"),
        ({"LLM3_COORDINATOR": "host"}, "^--coordinator='host': expected HOST:PORT"),
    ],
)
def test_contradictory_flags_are_rejected(changes, complaint):
    environment = {key: value for key, value in (EXPLICIT | changes).items() if value is not None}
    with pytest.raises(UserError, match=complaint):
        detect(environment)


def test_exchanges_are_local_for_a_single_process():
    assert processes.broadcast_from_first(lambda: {"a": 1}) == {"a": 1}
    assert processes.on_first_then_all(lambda: "made") == "made"
    assert processes.exchange("own") == ["own"]
    np.testing.assert_array_equal(processes.total(np.arange(3)), np.arange(3))
    processes.barrier()
    assert processes.published("place") == {}


def test_processes_that_do_not_come_together_in_time_say_so_and_end_with_a_status_that_is_worth_another_try(
    monkeypatch, capsys
):
    ended, statuses = threading.Event(), []
    monkeypatch.setattr(processes.os, "_exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: ended.wait(60))
    monkeypatch.setenv("LLM3_RENDEZVOUS_SECONDS", "1")
    processes.start("host:1234", 4, 2)
    assert statuses == [Exit.UNREACHABLE]
    said = "process 2 of 4, coordinator host:1234: not all of the processes came together in 1 s"
    assert said in " ".join(capsys.readouterr().err.split())
