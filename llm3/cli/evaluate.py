"""The verb `eval`: the newest checkpoints of a run, by its config's evaluations or by tasks of lm-eval."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from llm3.checkpoints.load import load_stage, load_tokenizer, stage_meta, trained_stages
from llm3.config.changes import changes
from llm3.config.model_schema import ModelConfig, check_length
from llm3.config.schema import EvaluationConfig, MeshConfig, RunConfig, as_dict
from llm3.data.chat_templates import kept_template, trained_template
from llm3.distributed import processes
from llm3.distributed.mesh_axes import table as rules_of
from llm3.distributed.sharding import axis_size, check_batch, make_mesh, rules_in_force
from llm3.errors import UserError
from llm3.evals import Compiled
from llm3.evals.harness import Options
from llm3.files import CHECKPOINTS
from llm3.report import table
from llm3.report.console import new_console
from llm3.segments import segmented
from llm3.stages import rules
from llm3.stages.evaluate import Measured, evaluate_subject, plain, progress, write_results
from llm3.stages.evaluation import subject_of, without_source
from llm3.stages.experiment import prepare
from llm3.stages.session import Session
from llm3.tree import size

Deliver = Callable[[list[tuple[dict[str, Any], Measured]]], int]
LEAST_ROWS = 16  # requests in a batch, if the mesh divides that


def evaluate(
    config: RunConfig | None,
    workdir: Path,
    stages: list[str] | None = None,
    tasks: list[str] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    as_json: bool = False,
    out: Path | None = None,
    **options: Any,
) -> int:
    """Print the rows of the chosen stages (default: all that are trained); writes nothing into the run.

    tasks: evaluate these tasks of lm-eval instead of the config's evaluations; a config then only gives the mesh.
    batch_size: requests in a batch. sequence_length: max tokens of a request (default: the longest window that one of
    the stages was trained on). as_json: print a line of JSON for each stage instead of a table, with its details. out:
    a new folder for rows, details and predictions, laid out as in a run. options: of the evaluation `harness`. Raises
    UserError.
    """
    console = new_console(soft_wrap=True, quiet=not processes.is_first(), stderr=as_json)
    deliver = partial(_deliver, console, as_json, out)
    if not tasks:
        assert config is not None  # see `llm3.cli.checks`
        return evaluate_config(config, workdir, stages, console, deliver)
    names = stages or processes.broadcast_from_first(lambda: trained_stages(workdir))
    mesh_config = config.mesh if config else MeshConfig()
    with naming_flags():
        chosen = Options(tasks=tuple(tasks), **{name: value for name, value in options.items() if value is not None})
    with rules_in_force(rules_of(mesh_config.rules)):
        mesh = make_mesh(vars(mesh_config), across_hosts=mesh_config.across_hosts, islands=processes.islands())
        with jax.set_mesh(mesh):
            return evaluate_tasks(workdir, names, chosen, batch_size, sequence_length, mesh, console, deliver)


def _deliver(console: Console, as_json: bool, out: Path | None, results: list[tuple[dict[str, Any], Measured]]) -> int:
    """Print rows, and write them with their details and predictions if asked to."""

    def write() -> None:
        for row, measured in results if out is not None else ():
            assert out is not None
            write_results(out / row["stage"], row, measured.details, measured.predictions)

    processes.broadcast_from_first(write)
    if as_json and processes.is_first():
        for row, measured in results:
            print(json.dumps(row | {"details": measured.details}, allow_nan=False))
    if not as_json:
        table.print_table([row for row, _ in results], [], console)
    if out is not None:
        console.print(f"Rows, details and predictions: {out}")
    return 0


def evaluate_config(
    config: RunConfig, workdir: Path, stages: list[str] | None, console: Console, deliver: Deliver
) -> int:
    """Evaluate the newest checkpoints of a run with the config's evaluations. Raises UserError."""
    order = [name for name in rules.chosen(config, stages) if stages or (workdir / name / CHECKPOINTS).is_dir()]
    if not order or not workdir.is_dir():
        raise UserError(f"{workdir} holds no trained stage of this config yet")
    session = Session(processes.on_first_then_all(lambda: prepare(config, workdir, order)), console)
    results = []
    with session.on_mesh():
        for name, stage in session.experiment.stages.items():
            params, model, meta = load_stage(workdir, name, mesh=session.mesh)
            now = replace(
                stage.model, compute_dtype=model.compute_dtype, max_output_positions=model.max_output_positions
            )
            found = changes(as_dict(model), as_dict(now), ModelConfig, "model")
            if lines := [f"  {each.line}" for each in found if each.kind != "free"]:
                raise UserError(f"{workdir / name} holds another model than this config:\n" + "\n".join(lines))
            row, measured = evaluate_subject(session, subject_of(stage), params)
            results.append((row | {"step": meta["step"]}, measured))
    return deliver(results)


@contextmanager
def naming_flags() -> Iterator[None]:
    """Errors of fields name the flags of these names: ".limit=-1: ..." becomes "--limit=-1: ..."."""
    try:
        yield
    except processes.RemoteError:  # another process prints it
        raise
    except UserError as error:
        raise UserError(f"--{str(error).removeprefix('.')}") from error.__cause__


def evaluate_tasks(
    workdir: Path,
    names: list[str],
    options: Options,
    batch_size: int | None,
    sequence_length: int | None,
    mesh: Mesh,
    console: Console,
    deliver: Deliver,
) -> int:
    """Deliver one row for each stage, with the tasks of the options as columns. Raises UserError."""
    results = []
    length, pieces = sequence_length or max(trained_length(workdir, name) for name in names), axis_size(mesh, "batch")
    rows_of_batch = batch_size or pieces * -(-LEAST_ROWS // pieces)
    config = EvaluationConfig("harness", batch_size=rows_of_batch, sequence_length=length)
    template = kept_template(workdir)
    with naming_flags():
        check_batch(mesh, rows_of_batch, length, 1, "")
        made = processes.on_first_then_all(lambda: without_source("", config, options, template, ""))
    compiled: Compiled = {}
    for name in names:
        params, model, meta = load_stage(workdir, name, mesh=mesh)
        tokenizer = load_tokenizer(workdir, name, meta)
        check_length(model, length, "--sequence_length")
        if not model.causal:
            raise UserError(f"{workdir / name} is a bidirectional model: it predicts hidden tokens, not the next one")
        template = trained_template(workdir, name, meta.get("chat_template"))
        if options.apply_chat_template and not template:
            raise UserError(f"--apply_chat_template: {workdir / name} was trained without a chat template")
        made = replace(made, template=template)
        console.print(f"{name}: evaluating step {meta['step']}, in windows of {length} tokens")
        one_segment = segmented(params, ((0, model.layers),))
        measured = made.measure(one_segment, model, tokenizer, mesh, compiled, progress(f"{name}: evaluating"))
        found = plain(name, made.name, measured, console)
        results.append(({"stage": name, **found.metrics, "params": size(params), "step": meta["step"]}, found))
    return deliver(results)


def trained_length(workdir: Path, name: str) -> int:
    """The tokens of a window that a stage was trained on."""
    return stage_meta(workdir, name)["config"]["stage"]["sequence_length"]
