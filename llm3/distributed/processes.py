"""The processes of one run: how they find each other, and how they act as one.

Every process runs the same program on its own devices. Only the first one writes files and prints. Its decisions are
broadcast, so that all processes take the same branches.
"""

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the key-value store of the coordinator has no public API
from jax.experimental import multihost_utils

from llm3 import remote
from llm3.errors import Exit, Unreachable, UserError, to_stderr

T = TypeVar("T")

VARIABLE, RENDEZVOUS_SECONDS = "LLM3_RENDEZVOUS_SECONDS", 300  # for all processes to be there
HEARTBEAT_SECONDS = 30  # a process silent for this long counts as dead, and all others end
ALL_DEVICES: dict[str, Any] = {"local_device_ids": []}  # all visible ones, not one per scheduler task
LONGEST_WAIT_SECONDS = 7 * 24 * 3600  # the first process may have a corpus to tokenize


class Cluster(NamedTuple):
    """A cluster. found: where it was found, for the log. arguments: for `jax.distributed.initialize`."""

    found: str
    arguments: dict[str, Any]


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Cluster | None:
    """The cluster given by the flags or the environment; None for a single process.

    In this order: the flags, each with a fallback variable (LLM3_COORDINATOR, LLM3_PROCESSES, LLM3_PROCESS); SLURM,
    inside `srun`; Open MPI; the metadata of a TPU. `processes=1` always means a single process. Raises UserError for
    contradictory flags.
    """
    coordinator = coordinator or environment.get("LLM3_COORDINATOR")
    processes = _number("LLM3_PROCESSES", processes, environment)
    process = _number("LLM3_PROCESS", process, environment)
    if processes == 1 and not process:
        return None
    if any(value is not None for value in (coordinator, processes, process)):
        return _explicit(coordinator, processes, process)
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
    if environment.get("LLM3_ACCELERATOR") == "tpu":  # set by launch/env.sh
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
    if coordinator is None or processes is None or process is None:
        missing = [name for name, value in flags.items() if value is None]
        raise UserError(f"{' and '.join(missing)}: missing; expected all of {', '.join(flags)}, or none of them")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"--process={process}: expected 0 to {processes - 1}, for --processes={processes}")
    if not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={coordinator!r}: expected HOST:PORT of process 0")
    arguments: dict[str, Any] = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    arguments["cluster_detection_method"] = "deactivate"  # do not use the devices of a surrounding scheduler
    return Cluster(f"process {process} of {processes}, coordinator {coordinator}", arguments)


def _devices_of_slurm_task(environment: Mapping[str, str]) -> dict[str, Any]:
    """All visible devices, unless several tasks share the devices of a node and each must take one."""
    shared = int(environment["SLURM_NTASKS"]) > int(environment.get("SLURM_STEP_NUM_NODES", 1))
    own = "SLURM_GPUS_PER_TASK" in environment or "SLURM_GPU_BIND" in environment
    return {} if "JAX_LOCAL_DEVICE_IDS" in environment or (shared and not own) else ALL_DEVICES


def _address(environment: Mapping[str, str]) -> dict[str, Any]:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    return {"coordinator_address": address} if address else {}


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> str:
    """Join the cluster that `detect` finds, before any device is used. Returns one line that describes it.

    Raises UserError as `detect`, and Unreachable if not all of them come together in `VARIABLE` seconds.
    """
    cluster = detect(os.environ, coordinator, processes, process)
    if cluster is None:
        return "one process"
    seconds = _number(VARIABLE, None, os.environ) or RENDEZVOUS_SECONDS
    # jax aborts some of those that have waited for too long; so it does not get that far
    waiting = threading.Timer(seconds, _give_up, (cluster.found, seconds))
    waiting.daemon = True
    jax.config.update("jax_enable_preemption_service", False)  # see llm3/distributed/preemption.py
    waiting.start()
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=seconds + 60,
        )
    except (RuntimeError, ValueError) as error:
        raise Unreachable(f"{cluster.found}: the processes did not find each other: {error}") from error
    finally:
        waiting.cancel()
    return f"{cluster.found}; coordinator {distributed.global_state.coordinator_address}"


def _give_up(found: str, seconds: int) -> None:
    with suppress(OSError):
        to_stderr(
            f"llm3: {found}: not all of the processes came together in {seconds} s ({VARIABLE} sets how long to wait): "
            f"was one of them not started, and can all of them reach the coordinator?"
        )
    os._exit(Exit.UNREACHABLE)


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def index() -> int:
    """The index of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return index() == 0


def islands() -> list[list[jax.Device]]:
    """Groups of devices with a fast network inside each group: TPU slices, or hosts for all other devices."""
    devices = jax.devices()
    if devices[0].platform == "tpu":
        group_of = {device: getattr(device, "slice_index", 0) for device in devices}
    else:
        publish("host", socket.gethostname())
        barrier()
        hosts = published("host")
        group_of = {device: hosts.get(device.process_index) for device in devices}
    groups = dict.fromkeys(group_of.values())  # ordered by first device
    return [[device for device in devices if group_of[device] == each] for each in groups]


_numbers = itertools.count()  # numbers the exchanges; all processes make the same ones in the same order


def barrier() -> None:
    """Return when all processes have reached this call."""
    if count() > 1:
        _client().wait_at_barrier(f"llm3/{next(_numbers)}", LONGEST_WAIT_SECONDS * 1000)


def broadcast_from_first(make: Callable[[], Any]) -> Any:
    """Call `make` on the first process and return its JSON-able value on all processes.

    Files that `make` wrote are visible to all processes afterwards. A UserError of `make` is raised on all of them.
    """
    if count() == 1:
        value = make()
        remote.push()
        return value
    key, client, error = f"llm3/{next(_numbers)}", _client(), None
    if is_first():
        try:
            message = {"value": make()}
            remote.push()
        except UserError as raised:
            error, message = raised, {"error": str(raised), "exit": int(raised.exit)}
        client.key_value_set(key, json.dumps(message))
        if error is not None:
            raise error
        return message["value"]
    message = json.loads(client.blocking_key_value_get(key, LONGEST_WAIT_SECONDS * 1000))
    if "error" in message:
        raise RemoteError(message["error"], message["exit"])
    remote.pull()
    return message["value"]


def exchange(value: Any) -> list[Any]:
    """The JSON-able values of all processes, in their order; all of them call it."""
    if count() == 1:
        return [value]
    name = f"exchange-{next(_numbers)}"
    publish(name, value)
    barrier()
    found = published(name)
    return [found[process] for process in range(count())]


def total(local: np.ndarray) -> np.ndarray:
    """The sum over all processes of arrays of one shape and dtype, in which it wraps around."""
    return np.asarray(multihost_utils.broadcast_one_to_all(local, is_source=True))  # every process is a source


def on_first_then_all(make: Callable[[], T]) -> T:
    """Call `make` on the first process, then on all others, so that they find the files it wrote.

    A UserError of the first process is raised on all of them.
    """
    made: list[T] = []
    broadcast_from_first(lambda: made.append(make()))
    return made[0] if made else make()


@contextmanager
def held_by_first(make: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a context on the first process while this one lasts; its UserError is raised on all of them."""
    with ExitStack() as held:
        broadcast_from_first(lambda: held.enter_context(make()))
        yield


class RemoteError(UserError):
    """A UserError of another process, which prints it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.exit = status


def publish(name: str, value: Any) -> None:
    """Publish a JSON-able value of this process under a name, at any time; see `published`."""
    if count() > 1:
        _client().key_value_set(f"llm3-{name}/{index()}", json.dumps(value), allow_overwrite=True)


def published(name: str) -> dict[int, Any]:
    """{process: the value it last published under this name}."""
    if count() == 1:
        return {}
    found = _client().key_value_dir_get(f"llm3-{name}")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def publish_once(name: str, value: Any) -> Any:
    """Publish a JSON-able value for all processes, unless one of them has: the one that counts is returned."""
    with suppress(Exception):  # there is one, or the coordinator is gone
        _client().key_value_set(f"llm3-{name}/all", json.dumps(value))
    with suppress(Exception):
        return published_once(name) or value
    return value


def published_once(name: str) -> Any:
    """The value of `publish_once`; None: there is none."""
    found = _client().key_value_dir_get(f"llm3-{name}") if count() > 1 else []
    return json.loads(found[0][1]) if found else None


def _client() -> Any:
    return distributed.global_state.client
