"""One process on its devices: the mesh, and the phases of each stage on it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from llm3 import __version__, evals
from llm3.data.chat_templates import template_hash
from llm3.data.contamination import contamination_sentence
from llm3.distributed import memory, processes
from llm3.distributed.machines import peak_flops, unknown_peak
from llm3.distributed.mesh_axes import table
from llm3.distributed.sharding import check_batch, make_mesh, rules_in_force
from llm3.distributed.watchdog import Watchdog
from llm3.handoff.pretrained import kept_description
from llm3.models.kernels import dot
from llm3.report.console import WARNING
from llm3.stages.cost import memory_fields
from llm3.stages.experiment import Experiment
from llm3.stages.stage import Stage
from llm3.stages.stopwatch import Stopwatch
from llm3.training.phase import Phase


class Session:
    """An experiment on a mesh. Enter `on_mesh()` around its methods."""

    def __init__(self, experiment: Experiment, console: Console):
        self.experiment, self.config, self.workdir = experiment, experiment.config, experiment.workdir
        self.console = console
        mesh = self.config.mesh
        self._rules = table(mesh.rules)
        self.mesh = make_mesh(vars(mesh), across_hosts=mesh.across_hosts, islands=processes.islands())
        with self.on_mesh():
            self._check_batches()
        kind = jax.devices()[0].device_kind
        peak = peak_flops(kind)
        self.peak_flops = peak and peak * jax.device_count()
        self.unknown_peak = unknown_peak(kind)
        self.compiled_evaluations: evals.Compiled = {}
        self.watchdog = Watchdog(self.config.hang_seconds, self.config.hang_limits)
        self.watch = Stopwatch()  # of the stage that runs, or of the run before its first stage
        self._phases: dict[str, list[Phase]] = {}
        self._run_phases: dict[str, list[Phase]] = {}

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Activate the mesh and its sharding rules."""
        with jax.set_mesh(self.mesh), rules_in_force(self._rules):
            yield

    def _check_batches(self) -> None:
        for name, evaluation in self.config.evaluations.items():
            where = f"config.evaluations.{name}"
            check_batch(self.mesh, evaluation.batch_size, evaluation.sequence_length, 1, where)
        for stage in self.experiment.stages.values():
            own = stage.config
            check_batch(self.mesh, own.batch_size, own.sequence_length, own.micro_batches, stage.where)

    def phases(self, stage: Stage) -> list[Phase]:
        """The phases of a stage, in order. Raises UserError if the stage does not fit the mesh."""
        if stage.name not in self._phases:
            self._phases[stage.name] = stage.phases(self.mesh)
        return self._phases[stage.name]

    def run_phases(self, stage: Stage) -> list[Phase]:
        """The phases of a stage that a run trains, in order, with those before each amendment. Raises UserError."""
        if stage.name not in self._run_phases:
            amended = len(stage.history) > 1
            self._run_phases[stage.name] = stage.phases_of_history(self.mesh) if amended else self.phases(stage)
        return self._run_phases[stage.name]

    def memory_fields(self, stage: Stage) -> list[str]:
        """Three fields that lower the memory of a stage's step, the most helpful first."""
        return memory_fields(stage, self.phases(stage)[-1].abstract_state, self.mesh, memory.device_bytes())

    def facts(self) -> dict[str, Any]:
        """Devices, dtype, versions and data of this run, for the header and the report."""
        devices, hosts = jax.devices(), processes.count()
        chosen = self.config.model.compute_dtype
        why = "set by the config" if chosen != "auto" else f"auto on {jax.default_backend()}"
        overlaps = [
            contamination_sentence(name, each) for name, each in self.experiment.overlaps().items() if each.near
        ]
        template, model = self.experiment.library.template, kept_description(self.workdir)
        trips = self.experiment.round_trips()
        none = "no evaluation document shares half or more of its 13-grams with the training data"
        return {
            "devices": f"{len(devices)} x {devices[0].device_kind}"
            + (f" of {hosts} processes" if hosts > 1 else "")
            + f", mesh {dict(self.mesh.shape)}"
            + (f"; {self.unknown_peak}" if self.unknown_peak else ""),
            "compute dtype": f"{self.experiment.compute_dtype} ({why}), parameters float32"
            + (f", matmuls of the layers {matmul}" if (matmul := self.config.model.matmul) != "compute" else ""),
            "versions": f"llm3 {__version__}, jax {jax.__version__}",
            "seed": self.config.seed,
            "overlap": "; ".join(overlaps) or none,
            **({"round trip": "; ".join(f"{name}: {each.phrase()}" for name, each in trips.items())} if trips else {}),
            "vocabulary": f"{self.experiment.tokenizer.vocab_size} (tokenizer {self.experiment.tokenizer.hash[:12]}"
            + (f", chat template {template_hash(template)[:12]})" if template else ")"),
        } | ({"model": f"{model.title} ({model.family}, files {model.digest[:12]})"} if model else {})

    def print_header(self) -> None:
        """Print the facts of this run, and warnings about its evaluations."""
        for name, fact in self.facts().items():
            self.console.print(f"{name:<14}{fact}")
        for evaluation in self.experiment.evaluations:
            if evaluation.warning:
                self.console.print(evaluation.warning, style=WARNING)

    def flops_per_second(self) -> float:
        """Expected hardware FLOP/s: 40 % of a known chip's peak, else half of the measured rate of a matmul."""
        return 0.4 * self.peak_flops if self.peak_flops else 0.5 * self._matmul_rate

    @cached_property
    def _matmul_rate(self) -> float:
        size = 512 if jax.default_backend() == "cpu" else 1024
        matmul = jax.jit(lambda x, y: dot(x, y, ((1,), (0,))))
        x = jnp.ones((size, size), self.experiment.compute_dtype)
        matmul(x, x).block_until_ready()
        started = time.perf_counter()
        for _ in range(5):
            x = matmul(x, x).block_until_ready()
        return jax.device_count() * 5 * 2 * size**3 / (time.perf_counter() - started)
