"""The rows that are measured before anything trains: of the pretrained model, and of the untrained one."""

import re
from dataclasses import replace

from llm3.distributed import processes
from llm3.files import INIT, ROW, START, read_json
from llm3.handoff.pretrained import Pretrained, find_pretrained, keep_description
from llm3.models.transformer import abstract_params, init
from llm3.stages.evaluate import write_row
from llm3.stages.evaluation import Subject
from llm3.stages.model import has_lm_leaves
from llm3.stages.parents import first_rows, model_starts
from llm3.stages.session import Session
from llm3.stages.start import loaded_params
from llm3.tree import flatten

NO_COST = {"tokens": 0, "flops": 0.0, "seconds": 0.0, "trainable_params": 0}


def evaluate_first_rows(session: Session) -> None:
    """Write the rows of the pretrained and of the untrained model, unless they exist. Raises UserError."""
    for name in first_rows(session.config):
        if not _is_measured(session, name):
            write_row(session, *MEASURED[name](session), NO_COST)


def _is_measured(session: Session, name: str) -> bool:
    return processes.broadcast_from_first(lambda: bool(read_json(session.workdir / name / ROW)))


def keep_model(session: Session) -> None:
    """Write down which model the run starts from, if it does and has not been. Raises UserError."""
    for name, start in model_starts(session.config).items():
        if not _is_measured(session, START):
            keep_description(find_pretrained(start, session.workdir, f"config.stages.{name}.start"), session.workdir)
        return


def _untrained(session: Session) -> tuple[Subject, dict]:
    model = session.experiment.init_model
    return Subject(INIT, model), init(model, session.experiment.init_seed, session.mesh)


def _pretrained(session: Session) -> tuple[Subject, dict]:
    """The model as it is, and its task head if it has one. What it lacks is initialized, and not evaluated."""
    name, start = next(iter(model_starts(session.config).items()))
    where = f"config.stages.{name}.start"
    parent = find_pretrained(start, session.workdir, where)
    model = replace(session.experiment.init_model, classes=len(parent.labels))
    abstract = abstract_params(model, session.mesh)
    params, account = loaded_params(
        session, with_all_leaves(parent, flatten(abstract)), abstract, model, session.experiment.init_seed, where
    )
    has_head = parent.labels and not any(path.startswith("head/") for path in account.fresh)
    subject = Subject(START, model, has_lm_leaves(parent.leaves, model), "labels" if has_head else "", parent.labels)
    return subject, params


def with_all_leaves(parent: Pretrained, model: dict) -> Pretrained:
    """The parent with a start that names every leaf that only it, or only the model, has."""
    fresh = tuple(re.escape(path) for path in model if path not in parent.leaves)
    drop = tuple(re.escape(path) for path in parent.leaves if path not in model)
    return parent._replace(start=parent.start._replace(fresh=fresh, drop=drop))


MEASURED = {INIT: _untrained, START: _pretrained}
