"""The verb `eval`: the newest checkpoints of a run, by its config's evaluations or by tasks of lm-eval."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm3.checkpoints.load import load_stage, trained_stages
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.cli import run
from llm3.config.model_schema import check_length
from llm3.config.schema import EvaluationConfig, MeshConfig, RunConfig
from llm3.data.chat_templates import kept_template, trained_template
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import processes
from llm3.distributed.mesh_axes import table as rules_of
from llm3.distributed.sharding import axis_size, check_batch, make_mesh, rules_in_force
from llm3.errors import UserError
from llm3.evals import Compiled
from llm3.evals.harness import Options
from llm3.files import CHECKPOINTS, TOKENIZER
from llm3.report import table
from llm3.segments import segmented
from llm3.stages.evaluate import plain, progress
from llm3.stages.evaluation import without_source
from llm3.tree import size

LEAST_ROWS = 16  # requests in a batch, if the mesh divides that


def evaluate(
    config: RunConfig | None,
    workdir: Path,
    stages: list[str] | None = None,
    tasks: list[str] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    **options: Any,
) -> int:
    """Print the rows of the chosen stages (default: all that are trained); writes no files.

    tasks: evaluate these tasks of lm-eval instead of the config's evaluations; a config then only gives the mesh.
    batch_size: requests in a batch. sequence_length: max tokens of a request (default: the longest window that one of
    the stages was trained on). options: of the evaluation `harness`. Raises UserError.
    """
    if not tasks:
        assert config is not None  # see `llm3.cli.checks`
        return run.evaluate(config, workdir, stages)
    names = stages or trained_stages(workdir)
    mesh_config = config.mesh if config else MeshConfig()
    with naming_flags():
        chosen = Options(tasks=tuple(tasks), **{name: value for name, value in options.items() if value is not None})
    with rules_in_force(rules_of(mesh_config.rules)):
        mesh = make_mesh(vars(mesh_config), across_hosts=mesh_config.across_hosts, islands=processes.islands())
        with jax.set_mesh(mesh):
            return evaluate_tasks(workdir, names, chosen, batch_size, sequence_length, mesh)


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
    workdir: Path, names: list[str], options: Options, batch_size: int | None, sequence_length: int | None, mesh: Mesh
) -> int:
    """Print one row for each stage, with the tasks of the options as columns. Raises UserError."""
    console, rows = run.make_console(), []
    length, pieces = sequence_length or max(trained_length(workdir, name) for name in names), axis_size(mesh, "batch")
    rows_of_batch = batch_size or pieces * -(-LEAST_ROWS // pieces)
    config = EvaluationConfig("harness", batch_size=rows_of_batch, sequence_length=length)
    template = kept_template(workdir)
    with naming_flags():
        check_batch(mesh, rows_of_batch, length, 1, "")
        made = processes.on_first_then_all(lambda: without_source("", config, options, template, ""))
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    compiled: Compiled = {}
    for name in names:
        params, model, meta = load_stage(workdir, name, mesh=mesh)
        check_length(model, length, "--sequence_length")
        if not model.causal:
            raise UserError(f"{workdir / name} is a bidirectional model: it predicts hidden tokens, not the next one")
        template = trained_template(workdir, name, meta.get("chat_template"))
        if options.apply_chat_template and not template:
            raise UserError(f"--apply_chat_template: {workdir / name} was trained without a chat template")
        made = replace(made, template=template)
        console.print(f"{name}: evaluating step {meta['step']}, in windows of {length} tokens")
        one_segment = segmented(params, ((0, model.layers),))
        measured = made.measure(one_segment, model, tokenizer, mesh, compiled, progress(name))
        metrics, _ = plain(name, made.name, measured, console)
        rows.append({"stage": name, **metrics, "params": size(params)})
    table.print_table(rows, [], console)
    return 0


def trained_length(workdir: Path, name: str) -> int:
    """The tokens of a window that a stage was trained on."""
    checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
    if (step := checkpoints.latest()) is None:
        raise UserError(f"{workdir / name} has no complete checkpoint yet")
    return checkpoints.meta(step)["config"]["stage"]["sequence_length"]
