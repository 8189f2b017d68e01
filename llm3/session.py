"""One process on its devices: the mesh, and the evaluation of parameters into rows of the matrix."""

import math
import re
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from llm3 import __version__, evals
from llm3.config import ModelConfig, StageConfig
from llm3.data.mixture import finite_batches
from llm3.errors import UserError
from llm3.experiment import Experiment
from llm3.flops import peak_flops
from llm3.handoff import INIT, read_start
from llm3.models.transformer import abstract, init, segmented
from llm3.sharding import check_batch, make_mesh, place_batch
from llm3.trainer import Trainer, build
from llm3.tree import params_digest, size
from llm3.workdir import ROW, read_json, write_json


class Session:
    """An experiment on a mesh. Enter `jax.set_mesh(session.mesh)` around its methods."""

    def __init__(self, experiment: Experiment, console: Console):
        self.experiment, self.config, self.workdir = experiment, experiment.config, experiment.workdir
        self.console = console
        if jax.process_count() > 1:
            raise UserError(f"{jax.process_count()} processes: llm3 runs in one process, on all of its devices, so far")
        self.mesh = make_mesh(vars(self.config.mesh))
        for name, evaluation in self.config.evaluations.items():
            check_batch(self.mesh, evaluation.batch_size, 1, f"config.evaluations.{name}")
        for name in experiment.order:
            stage = self.config.stages[name]
            check_batch(self.mesh, stage.batch_size, stage.micro_batches, f"config.stages.{name}")
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = peak and peak * jax.device_count()
        self._phases: dict[str, list[Trainer]] = {}
        self._eval_steps: dict[tuple[str, ModelConfig], Any] = {}

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

        return build(stage, model, self.mesh, fresh=fresh, seed=self.experiment.seed(name), where=where)

    def facts(self) -> dict[str, Any]:
        """What this run runs on, for the header and the report."""
        devices = jax.devices()
        chosen = self.config.model.compute_dtype
        why = "as the config says" if chosen != "auto" else f"auto on {jax.default_backend()}"
        return {
            "devices": f"{len(devices)} x {devices[0].device_kind}, mesh {dict(self.mesh.shape)}",
            "compute dtype": f"{self.experiment.compute_dtype} ({why}), parameters float32",
            "versions": f"llm3 {__version__}, jax {jax.__version__}",
            "seed": self.config.seed,
            "overlap": self.overlap(),
            "vocabulary": f"{self.experiment.tokenizer.vocab_size} (tokenizer {self.experiment.tokenizer.hash[:12]})",
        }

    def overlap(self) -> str:
        """How many documents of each evaluation are, word for word, in the training data of the stages; in words."""
        training = sorted({source for name in self.experiment.order for source in self.config.stages[name].data})
        found = []
        for name, evaluation in self.config.evaluations.items():
            count = self.experiment.library.overlap(evaluation.source, evaluation.split, training)
            documents = self.experiment.library.cache(evaluation.source, evaluation.split).documents
            found += [f"{count} of {documents} documents of {name} are in the training data"] if count else []
        return "; ".join(found) or "no evaluation document is in the training data"

    def print_header(self) -> None:
        """Devices, dtype and why, versions."""
        for name, fact in self.facts().items():
            self.console.print(f"{name:<14}{fact}")

    def row(self, name: str) -> dict | None:
        """The row of a stage (or of "init") in the matrix, once it has been evaluated."""
        return read_json(self.workdir / name / ROW)

    def figures(self, params: dict, name: str) -> dict[str, float | None]:
        """All evaluations of the canonical parameters of stage `name`; None where one does not apply."""
        model, labels, result = self.experiment.model(name), self.experiment.labels(name), {}
        for evaluation, config in self.config.evaluations.items():
            peer = evals.load(config.kind)
            if peer.NEEDS_HEAD and labels != self.experiment.library.labels(config.source):
                continue
            if (evaluation, model) not in self._eval_steps:
                graph = abstract(model).graph
                lengths = self.experiment.tokenizer.byte_lengths
                self._eval_steps[evaluation, model] = evals.make_eval_step(peer, graph, lengths)
            windows = self.experiment.evaluation_windows(evaluation)
            batches = (place_batch(self.mesh, batch) for batch in finite_batches(windows, config.batch_size))
            whole = segmented(params, ((0, model.layers),))
            figures = evals.evaluate(peer, self._eval_steps[evaluation, model], whole, batches)
            for figure, value in figures.items():
                if not math.isfinite(value):
                    self.console.print(f"{name}: {evaluation}_{figure} is {value}", style="bold red")
                result[f"{evaluation}_{figure}"] = value if math.isfinite(value) else None
        return result

    def evaluate(self, name: str, params: dict) -> dict:
        """The figures of a stage's canonical parameters as a row of the matrix, with their number and digest."""
        self.console.print(f"{name}: evaluating")
        started = time.perf_counter()
        row = {"stage": name, **self.figures(params, name)}
        return row | {
            "majority_accuracy": next((row[key] for key in row if key.endswith("_majority_accuracy")), None),
            "params": size(params),
            "params_digest": params_digest(params),
            "evaluation_seconds": time.perf_counter() - started,
        }

    def write_row(self, name: str, params: dict, cost: dict) -> None:
        """Evaluate the parameters, and keep the row with what they cost."""
        write_json(self.workdir / name / ROW, self.evaluate(name, params) | cost)

    def evaluate_init(self) -> None:
        """The untrained model's row."""
        if not self.row(INIT):
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
