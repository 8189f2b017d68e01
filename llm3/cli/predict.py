"""The verb `predict`: apply a trained stage to the rows of a file."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm3.checkpoints.load import load_stage
from llm3.cli.checks import check_predict
from llm3.config.schema import MeshConfig, RunConfig
from llm3.data.sources.inputs import open_input
from llm3.distributed import processes
from llm3.distributed.mesh_axes import table as rules_of
from llm3.distributed.sharding import axis_size, check_batch, make_mesh, place_batch, rules_in_force
from llm3.errors import UserError, counted
from llm3.predict.output import STDOUT, Output, counts, print_rows
from llm3.predict.run import Request, columns_of, parts, predict_rows, prepare
from llm3.predict.session import Session
from llm3.predict.trained import open_trained
from llm3.report.console import counting, new_console
from llm3.segments import segmented

LEAST_ROWS = 16  # windows in a batch, if the mesh divides that


def predict(
    workdir: Path,
    stage: str,
    input: str,
    out: str,
    what: str | None = None,
    source: str | None = None,
    keep: str = "all",
    step: str = "latest",
    batch_size: int | None = None,
    sequence_length: int | None = None,
    no_transforms: bool = False,
    config: RunConfig | None = None,
    **flags: Any,
) -> int:
    """Write a row of predictions for each row of the input, in its order.

    input, out: files, or "-". what: a kind of predictions. source: the source of the stage whose fields name the
    columns. keep: "all", "none" or the columns of the input that are passed on. config: for its mesh, and for
    transforms beside it. flags: fields of a source and options of the kind; None: not given. Raises UserError.
    """
    check_predict({"input": input, "out": out, "batch_size": batch_size, "sequence_length": sequence_length})
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    trained, rows = open_trained(workdir, stage, step), open_input(input)
    if rows.is_stream and processes.count() > 1:
        raise UserError("--in=-: standard input belongs to one process: expected a file, or one process")
    chosen: dict[str, Any] = {
        "source": source,
        "keep": keep,
        "length": sequence_length,
        "transforms": not no_transforms,
    }
    request = prepare(trained, rows, what, given, **chosen)
    output = None if out == STDOUT else Output(out, request.about, columns_of(request.kind, trained))
    mesh_config = config.mesh if config else MeshConfig()
    with rules_in_force(rules_of(mesh_config.rules)):
        mesh = make_mesh(vars(mesh_config), across_hosts=mesh_config.across_hosts, islands=processes.islands())
        with jax.set_mesh(mesh):
            size = rows_of_batch(mesh, request.length, batch_size)
            done = processes.broadcast_from_first(output.begin) if output else 0
            if done is None:
                _say(f"{out} is finished; nothing left to do")
                return 0
            return write_predictions(request, open_session(request, mesh, size), output, done)


def rows_of_batch(mesh: Mesh, length: int, batch_size: int | None) -> int:
    """The windows of a batch. Raises UserError for sizes that the mesh does not divide."""
    pieces = axis_size(mesh, "batch")
    size = batch_size or pieces * -(-LEAST_ROWS // pieces)
    try:
        check_batch(mesh, size, length, 1, "")
    except UserError as error:
        raise UserError(f"--{str(error).removeprefix('.')}") from None
    return size


def open_session(request: Request, mesh: Mesh, size: int) -> Session:
    """The stage with its parameters on the mesh. size: windows of a batch."""
    trained = request.trained
    params, model, _ = load_stage(trained.workdir, trained.name, str(trained.meta["step"]), mesh)
    one_segment, place = segmented(params, ((0, model.layers),)), partial(place_batch, mesh)
    options = request.kind.options
    return Session(trained, request.fields, options, one_segment, model, place, {}, size, request.length)


def write_predictions(request: Request, session: Session, output: Output | None, done: int) -> int:
    """Predict and write the rows from part `done` on; output: None: print them. Returns the exit status."""
    trained, kind, fields = request.trained, request.kind, request.fields
    source = f" as in source {fields.name!r}" if fields.name else ""
    _say(f"{trained.where} step {trained.meta['step']}: {kind.name} from {', '.join(fields.columns)}{source}")
    size, started, printed = kind.plugin.ROWS, time.monotonic(), Counter[str]()
    if done:
        _say(f"resumes at row {done * size:,}")
    made = tokens = 0
    with progress(request.rows.count(), kind.name) as advance:
        advance(done * size)
        for number, some in parts(request.rows, size, done):
            found = predict_rows(session, kind, some, number * size, request.keep)
            made += len(found)
            tokens += sum(each.get("tokens") or 0 for each in found)
            if output is None:
                printed.update(counts(found))
            if processes.is_first():
                print_rows(found) if output is None else output.write(number, found)
            advance(len(found))
    seconds = max(time.monotonic() - started, 1e-9)
    whole = processes.broadcast_from_first(output.finish) if output else printed
    rate = f"{made / seconds:,.1f} rows/s" + (f", {tokens / seconds:,.0f} tokens/s" if tokens else "")
    _say(f"{summary(whole)}{f' -> {output.path}' if output else ''}; {rate} in {seconds:.1f} s")
    return 0


def summary(found: Mapping[str, int]) -> str:
    """The `counts` of an output: how many rows, and how many of them without a prediction or truncated."""
    errors, truncated = found.get("errors", 0), found.get("truncated", 0)
    notes = [f"{errors:,} with an error"] * bool(errors) + [f"{truncated:,} truncated to the window"] * bool(truncated)
    return counted(found.get("rows", 0), "row") + (f" ({', '.join(notes)})" if notes else "")


@contextmanager
def progress(total: int | None, label: str) -> Iterator[Callable[[int], None]]:
    """Count rows on standard error, on the first process."""
    if processes.is_first():
        with counting(total, label, "rows", console=new_console(stderr=True)) as advance:
            yield advance
    else:
        yield lambda number: None


def _say(text: str) -> None:
    """Print a line to standard error, on the first process."""
    if processes.is_first():
        new_console(stderr=True).print(text, soft_wrap=True)
