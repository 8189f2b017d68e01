"""Submits the stage runs of an ablation to SLURM: tasks of array jobs, each of which waits for its parent's task."""

import itertools
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from llm3.ablation.graph import Node, directory
from llm3.ablation.local import FAILED, LOG, last_line
from llm3.errors import Exit, UserError, counted
from llm3.files import read_json, write_atomic, write_json

SCRIPT = "launch/slurm.sbatch"
JOBS = "jobs.json"  # in the folder of an ablation: {stage run: its task, as in "4711_0"}
ARRAYS = "slurm"  # the folder of an ablation with the folders of each array job


class Array(NamedTuple):
    """Stage runs of one job, which differ in their seeds. dependency: what its tasks wait for, "" for nothing."""

    nodes: list[Node]
    dependency: str


class Jobs:
    """The jobs of an ablation in `workdir`.

    prepare: writes the folder of a node. result: a phrase on the result of a node, None if it is not finished. options:
    of sbatch. seeds: all seeds, whose positions number the tasks of an array.
    """

    def __init__(
        self,
        workdir: Path,
        console: Console,
        prepare: Callable[[Node], Path],
        result: Callable[[Node], str | None],
        options: list[str],
        seeds: list[int],
    ):
        self._workdir, self._console = workdir.resolve(), console
        self._prepare, self._result = prepare, result
        self._options, self._seeds = options, seeds
        self._tasks: dict[str, str] = read_json(workdir / JOBS) or {}

    def submit(self, nodes: Iterable[Node]) -> int:
        """Submit the nodes, parents first, that are neither finished nor queued; returns the exit status.

        Nodes that failed are reported, and submitted again with those that wait for them. Raises UserError if SLURM
        refuses.
        """
        nodes = list(nodes)
        unfinished = [each for each in nodes if self._result(each) is None]
        queued = self._queued()
        waiting = [each for each in unfinished if each.name not in queued]
        logs = {each.name: directory(self._workdir, each.name) / LOG for each in waiting if each.name in self._tasks}
        failed = {name: last_line(log) for name, log in logs.items() if log.is_file()}
        write_json(self._workdir / FAILED, failed)
        for name, why in failed.items():
            self._console.print(f"{name} failed: {why}")
        for group in groups(nodes, {each.name for each in waiting}):
            for array in self._arrays(group, queued):
                self._submit(array)
                queued |= {each.name for each in array.nodes}
        if unfinished:
            count = counted(len(unfinished), "stage run")
            self._console.print(f"{count} in the queue. Rerun the command when they have ended, for the results.")
        return Exit.PARTIAL if failed else 0

    def _queued(self) -> set[str]:
        """The nodes whose tasks wait or run."""
        tasks = set(_run(["squeue", "--noheader", "--array", "--me", "--format=%i"]).split() if self._tasks else ())
        return {name for name, task in self._tasks.items() if task in tasks}

    def _arrays(self, group: list[Node], queued: set[str]) -> Iterator[Array]:
        """The array jobs of a group: tasks wait for one task, or each for the task of the same number."""
        if ready := [each for each in group if each.parent not in queued]:
            yield Array(ready, "")
        parents: dict[str, list[Node]] = {}
        for node in group:
            if node.parent in queued:
                parents.setdefault(self._tasks[node.parent].partition("_")[0], []).append(node)
        for job, children in parents.items():
            tasks = [self._tasks[each.parent] for each in children]
            if len(set(tasks)) == 1:
                yield Array(children, f"afterok:{tasks[0]}")
            elif tasks == [f"{job}_{self._index(each)}" for each in children]:
                yield Array(children, f"aftercorr:{job}")
            else:
                yield from (Array([each], f"afterok:{task}") for each, task in zip(children, tasks, strict=True))

    def _index(self, node: Node) -> int:
        return self._seeds.index(node.uses[0][1])

    def _submit(self, array: Array) -> None:
        first = array.nodes[0]
        folders = {self._index(each): str(self._prepare(each)) for each in array.nodes}
        file = self._new_file(first.stage)
        write_atomic(file, "".join(f"{folders.get(index, '')}\n" for index in range(max(folders) + 1)))
        options = [f"--job-name=llm3-{first.stage}", f"--array={','.join(map(str, sorted(folders)))}"]
        options.append(f"--output={file.with_suffix('')}-%a.log")
        if array.dependency:  # without the second option, a task after a failed one would wait forever
            options += [f"--dependency={array.dependency}", "--kill-on-invalid-dep=yes"]
        command = ["sbatch", "--parsable", *options, *self._options, SCRIPT, "--bare"]
        job = _run(command, RUNS=str(file), STAGES="").strip().partition(";")[0]  # without the name of the cluster
        self._tasks |= {each.name: f"{job}_{self._index(each)}" for each in array.nodes}
        write_json(self._workdir / JOBS, self._tasks)
        self._console.print(f"{first.stage} of {first.uses[0][0]}: job {job}, {counted(len(folders), 'task')}")

    def _new_file(self, stage: str) -> Path:
        files = (self._workdir / ARRAYS / f"{stage}-{number}.txt" for number in itertools.count(1))
        return next(each for each in files if not each.exists())


def groups(nodes: Iterable[Node], wanted: set[str]) -> list[list[Node]]:
    """The wanted nodes in groups that differ only in their seeds, parents first. nodes: all, parents first."""
    depth: dict[str, int] = {"": 0}
    found: dict[tuple[int, str, str], list[Node]] = {}
    for node in nodes:
        depth[node.name] = depth[node.parent] + 1
        if node.name in wanted:
            found.setdefault((depth[node.name], node.stage, node.uses[0][0]), []).append(node)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def _run(command: list[str], **variables: str) -> str:
    """What one of SLURM's commands prints. Raises UserError if it fails."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
