"""One process on its devices: the mesh, and the evaluation of parameters into rows of the matrix."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from llm3 import __version__, evals
from llm3.checkpoints.metadata import digests_of
from llm3.config.schema import ModelConfig, StageConfig
from llm3.data.contamination import sentence
from llm3.distributed import processes
from llm3.distributed.machines import peak_flops
from llm3.distributed.processes import islands
from llm3.distributed.sharding import check_batch, make_mesh, place_batch, rules_in_force, table
from llm3.handoff.parent import INIT, read_start
from llm3.models.transformer import init, segmented
from llm3.objectives import read_options
from llm3.stages.experiment import Experiment
from llm3.stages.workdir import DETAILS, ROW, read_json, write_json
from llm3.training.phase import Trainer, build
from llm3.tree import combine_digests, flatten, size


class Session:
    """An experiment on a mesh. Enter `on_mesh()` around its methods."""

    def __init__(self, experiment: Experiment, console: Console):
        self.experiment, self.config, self.workdir = experiment, experiment.config, experiment.workdir
        self.console = console
        mesh = self.config.mesh
        self._rules = table(mesh.rules)
        self.mesh = make_mesh(vars(mesh), across=mesh.across, islands=islands())
        with self.on_mesh():
            self._check_batches()
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * jax.device_count()
        self._phases: dict[str, list[Trainer]] = {}
        self._compiled: evals.Compiled = {}

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Put the mesh, and the table of what is cut along its axes, in force."""
        with jax.set_mesh(self.mesh), rules_in_force(self._rules):
            yield

    def _check_batches(self) -> None:
        for name, evaluation in self.config.evaluations.items():
            where = f"config.evaluations.{name}"
            check_batch(self.mesh, evaluation.batch_size, evaluation.sequence_length, 1, where)
        for name in self.experiment.order:
            stage, where = self.config.stages[name], f"config.stages.{name}"
            check_batch(self.mesh, stage.batch_size, stage.sequence_length, stage.micro_batches, where)

    def phases(self, name: str) -> list[Trainer]:
        """The trainers of a stage, one after another. Raises UserError for what does not fit."""
        if name not in self._phases:
            self._phases[name] = self.build(name, self.config.stages[name], self.experiment.model(name))
        return self._phases[name]

    def trainer(self, name: str) -> Trainer:
        """The trainer that a stage begins with."""
        return self.phases(name)[0]

    def full_trainer(self, name: str) -> Trainer:
        """What full fine-tuning of the same model on the same batches would be, to compare a stage with."""
        stage = self.config.stages[name]
        plain = replace(stage.optimizer, learning_rates=[])
        full = replace(stage, train="all", unfreeze=[], adapters={}, frozen="float32", optimizer=plain)
        return self.build(name, full, replace(self.experiment.model(name), adapters=()))[0]

    def build(self, name: str, stage: StageConfig, model: ModelConfig) -> list[Trainer]:
        """The trainers of a stage, or of a variant of it."""
        where = f"config.stages.{name}"
        start = read_start(stage.start, self.workdir, f"{where}.start")
        from_nothing = start is None or start.stage == INIT

        def fresh(path: str) -> bool:
            return from_nothing or any(re.fullmatch(rule, path) for rule in start.fresh)

        task, seed = self.experiment.task(name), self.experiment.seed(name)
        return build(stage, model, self.mesh, task=task, fresh=fresh, seed=seed, where=where)

    def facts(self) -> dict[str, Any]:
        """What this run runs on, for the header and the report."""
        devices, hosts = jax.devices(), processes.count()
        chosen = self.config.model.compute_dtype
        why = "as the config says" if chosen != "auto" else f"auto on {jax.default_backend()}"
        return {
            "devices": f"{len(devices)} x {devices[0].device_kind}"
            + (f" of {hosts} processes" if hosts > 1 else "")
            + f", mesh {dict(self.mesh.shape)}",
            "compute dtype": f"{self.experiment.compute_dtype} ({why}), parameters float32",
            "versions": f"llm3 {__version__}, jax {jax.__version__}",
            "seed": self.config.seed,
            "overlap": self.overlap(),
            "vocabulary": f"{self.experiment.tokenizer.vocab_size} (tokenizer {self.experiment.tokenizer.hash[:12]})",
        }

    def overlap(self) -> str:
        """How much of each evaluation is in the training data of the stages; in words."""
        found = [sentence(name, found) for name, found in self.experiment.overlaps().items() if found.near]
        return "; ".join(found) or "no evaluation document is, even by half of its 13-grams, in the training data"

    def print_header(self) -> None:
        """Devices, dtype and why, versions."""
        for name, fact in self.facts().items():
            self.console.print(f"{name:<14}{fact}")

    def row(self, name: str) -> dict | None:
        """The row of a stage (or of "init") in the matrix, once it has been evaluated."""
        return read_json(self.workdir / name / ROW)

    def figures(self, params: dict, name: str, only: str = "") -> tuple[dict[str, float | None], dict[str, Any]]:
        """All evaluations of the canonical parameters of stage `name` that apply (or `only` one): figures, and details.

        A figure that is not finite is None.
        """
        model, figures, details = self.experiment.model(name), {}, {}
        whole = segmented(params, ((0, model.layers),))
        for evaluation in self.config.evaluations:
            if (only and evaluation != only) or not self.experiment.applies(evaluation, name):
                continue
            for figure, value in self._test(evaluation, model, whole).items():
                key = f"{evaluation}_{figure}"
                if isinstance(value, dict | list):
                    details[key] = value
                    continue
                if not math.isfinite(value):
                    self.console.print(f"{name}: {key} is {value}", style="bold red")
                figures[key] = value if math.isfinite(value) else None
        return figures, details

    def _test(self, evaluation: str, model: ModelConfig, params: dict) -> dict[str, Any]:
        config, experiment = self.config.evaluations[evaluation], self.experiment
        peer = evals.load(config.kind)
        return peer.figures(
            evals.Test(
                params=params,
                model=model,
                config=config,
                options=read_options(peer, config.options, f"config.evaluations.{evaluation}.options"),
                kind=experiment.evaluation_kind(evaluation),
                cache=experiment.evaluation_cache(evaluation),
                tokenizer=experiment.tokenizer,
                place=partial(place_batch, self.mesh),
                compiled=self._compiled,
            )
        )

    def evaluate(self, name: str, params: dict) -> tuple[dict, dict]:
        """The figures of a stage's canonical parameters as a row of the matrix, and their details."""
        self.console.print(f"{name}: evaluating")
        started = time.perf_counter()
        figures, details = self.figures(params, name)
        constant = [value for key, value in figures.items() if key.endswith("_majority_accuracy")]
        return {
            "stage": name,
            **figures,
            "majority_accuracy": constant[0] if len(constant) == 1 else None,
            "params": size(params),
            "params_digest": combine_digests(digests_of(flatten(params))),
            "evaluation_seconds": time.perf_counter() - started,
        }, details

    def write_row(self, name: str, params: dict, cost: dict) -> None:
        """Evaluate the parameters, and keep the row with what they cost."""
        row, details = self.evaluate(name, params)

        def write() -> None:
            if details:
                write_json(self.workdir / name / DETAILS, details)
            write_json(self.workdir / name / ROW, row | cost)

        processes.from_first(write)

    def evaluate_init(self) -> None:
        """The untrained model's row."""
        if not processes.from_first(lambda: bool(self.row(INIT))):
            params = init(self.experiment.model(INIT), self.experiment.seed(INIT), self.mesh)
            self.write_row(INIT, params, {"tokens": 0, "flops": 0.0, "seconds": 0.0, "trainable_params": 0})

    def flops_per_second(self) -> float:
        """What to expect: 40 % of a known chip's peak, else half of what a matrix product reaches here now."""
        return 0.4 * self.peak_flops if self.peak_flops else 0.5 * self._matmul_rate

    @cached_property
    def _matmul_rate(self) -> float:
        size, product = 1024, jax.jit(jnp.dot)
        x = jnp.ones((size, size), self.experiment.compute_dtype)
        product(x, x).block_until_ready()
        started = time.perf_counter()
        for _ in range(5):
            x = product(x, x).block_until_ready()
        return jax.device_count() * 5 * 2 * size**3 / (time.perf_counter() - started)
