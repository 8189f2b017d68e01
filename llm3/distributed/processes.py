"""The processes of one run: how they find each other, and how they act as one.

Every process runs the same program on its own devices. The first one alone writes files and speaks; what it decides is
passed on, so that all of them take the same way.
"""

import itertools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src import distributed  # the coordinator's key-value store: jax has no public name for it

from llm3.errors import UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is taken for dead, and all others end
LEAVING_SECONDS = 5
ALL_DEVICES = {"local_device_ids": []}  # that it sees; left out, jax takes one for each task of a scheduler
LONGEST_WAIT_SECONDS = 7 * 24 * 3600  # for the first process, which may have a corpus to tokenize


class Cluster(NamedTuple):
    """What was found. arguments: those of `jax.distributed.initialize`."""

    found: str
    arguments: dict[str, Any]


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Cluster | None:
    """The cluster that flags or the environment name: None for a process that is alone.

    In this order: the flags, each of which the variables LLM3_COORDINATOR, LLM3_PROCESSES and LLM3_PROCESS stand in
    for; SLURM, inside `srun`; Open MPI; a TPU's metadata. `processes=1` is a process alone, whatever else is found.
    Raises UserError for what contradicts itself.
    """
    given = {
        "coordinator": coordinator or environment.get("LLM3_COORDINATOR"),
        "processes": _number("LLM3_PROCESSES", processes, environment),
        "process": _number("LLM3_PROCESS", process, environment),
    }
    if given["processes"] == 1 and not given["process"]:
        return None
    if any(value is not None for value in given.values()):
        return _explicit(**given)
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        who = f"task {environment['SLURM_PROCID']} of {environment['SLURM_NTASKS']}"
        return Cluster(
            f"SLURM: {who} of job {environment['SLURM_JOB_ID']}",
            _address(environment) | {"cluster_detection_method": "slurm"} | _devices_of_slurm_task(environment),
        )
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        who = f"rank {environment['OMPI_COMM_WORLD_RANK']} of {environment['OMPI_COMM_WORLD_SIZE']}"
        alone = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) == 1
        devices = ALL_DEVICES if alone else {}
        return Cluster(f"Open MPI: {who}", _address(environment) | {"cluster_detection_method": "ompi"} | devices)
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Cluster(f"TPU: worker {environment.get('TPU_WORKER_ID', '?')} of {max(len(hosts), 1)}", {})
    if environment.get("LLM3_ACCELERATOR") == "tpu":  # as launch/env.sh finds it
        return Cluster("TPU: by the metadata of the machine", {})
    return None


def _number(name: str, flag: int | None, environment: Mapping[str, str]) -> int | None:
    if flag is not None or name not in environment:
        return flag
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name}={environment[name]!r}: expected a whole number") from None


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> Cluster:
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in flags.items() if value is None]:
        raise UserError(f"{' and '.join(missing)}: expected as well; all of {', '.join(flags)}, or none of them")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"--process={process}: expected 0 to {processes - 1}, for --processes={processes}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={coordinator!r}: expected HOST:PORT of process 0")
    arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    arguments["cluster_detection_method"] = "deactivate"  # else the devices are those of a scheduler around it
    return Cluster(f"process {process} of {processes}, coordinator {coordinator}", arguments)


def _devices_of_slurm_task(environment: Mapping[str, str]) -> dict[str, list]:
    """All that the task sees, unless several of them see those of their node and have to take one each."""
    shared = int(environment["SLURM_NTASKS"]) > int(environment.get("SLURM_STEP_NUM_NODES", 1))
    own = "SLURM_GPUS_PER_TASK" in environment or "SLURM_GPU_BIND" in environment
    return {} if "JAX_LOCAL_DEVICE_IDS" in environment or (shared and not own) else ALL_DEVICES


def _address(environment: Mapping[str, str]) -> dict[str, str]:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    return {"coordinator_address": address} if address else {}


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> str:
    """Join the cluster that `detect` finds, before any device is touched; in a line, what was found.

    Raises UserError as `detect` does, and where the others cannot be reached.
    """
    cluster = detect(os.environ, coordinator, processes, process)
    if cluster is None:
        return "one process"
    try:
        jax.distributed.initialize(**cluster.arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{cluster.found}: the processes did not find each other: {error}") from error
    return f"{cluster.found}; coordinator {distributed.global_state.coordinator_address}"


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def index() -> int:
    """Which of them this is."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return index() == 0


def islands() -> list[list[jax.Device]]:
    """The devices in groups inside of which the network is fast: the slices of TPUs, the hosts of all others."""
    devices = jax.devices()
    if devices[0].platform == "tpu":
        of = {device: getattr(device, "slice_index", 0) for device in devices}
    else:
        publish("host", socket.gethostname())
        barrier()
        hosts = published("host")
        of = {device: hosts.get(device.process_index) for device in devices}
    groups = dict.fromkeys(of.values())  # in the order of their first device
    return [[device for device in devices if of[device] == each] for each in groups]


_numbers = itertools.count()  # of the exchanges so far: all processes have the same ones, in the same order


def barrier() -> None:
    """Return when all processes have come here."""
    if count() > 1:
        _client().wait_at_barrier(f"llm3/{next(_numbers)}", LONGEST_WAIT_SECONDS * 1000)


def broadcast_from_first(make: Callable[[], Any]) -> Any:
    """The JSON-able value that `make` gives on the first process, on all of them.

    Whatever was written there before is there for all. A UserError of `make` is raised on all.
    """
    if count() == 1:
        return make()
    key, client, error = f"llm3/{next(_numbers)}", _client(), None
    if is_first():
        try:
            told = {"value": make()}
        except UserError as raised:
            error, told = raised, {"error": str(raised), "exit": int(raised.exit)}
        client.key_value_set(key, json.dumps(told))
        if error is not None:
            raise error
        return told["value"]
    told = json.loads(client.blocking_key_value_get(key, LONGEST_WAIT_SECONDS * 1000))
    if "error" in told:
        raise RemoteError(told["error"], told["exit"])
    return told["value"]


def on_first_then_all(make: Callable[[], T]) -> T:
    """What `make` gives: on the first process first, on the others when it is done, so that they find its files.

    A UserError of the first is raised on all.
    """
    made: list[T] = []
    broadcast_from_first(lambda: made.append(make()))
    return made[0] if made else make()


class RemoteError(UserError):
    """An error of another process, which says it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.exit = status


def publish(name: str, value: Any) -> None:
    """Let the others know a JSON-able value of this process, at any time; see `published`."""
    if count() > 1:
        _client().key_value_set(f"llm3-{name}/{index()}", json.dumps(value), allow_overwrite=True)


def published(name: str) -> dict[int, Any]:
    """{process: value} of what each has last published under a name."""
    if count() == 1:
        return {}
    found = _client().key_value_dir_get(f"llm3-{name}")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


@contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[str]:
    """`start`, for as long as this context lasts; an error ends the whole process at once where there are others.

    They may wait for it in a computation, which no exception reaches: jax notices the loss, and they end too.
    """
    found = start(coordinator, processes, process)
    try:
        yield found
    except BaseException as error:
        if count() == 1:
            raise
        with suppress(OSError):  # what is said may have no reader any more, such as a connection that was lost
            if not isinstance(error, UserError):
                print(f"llm3: process {index()} of {count()}:", file=sys.stderr)
                traceback.print_exc()
            elif not isinstance(error, RemoteError):
                print(f"llm3: process {index()}: {error}", file=sys.stderr)
        with suppress(Exception):  # the others may be about to read why; the first process holds what they read
            _client().wait_at_barrier("llm3/leaving", LEAVING_SECONDS * 1000)
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit", 1)))


def _client() -> Any:
    return distributed.global_state.client
