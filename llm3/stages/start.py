"""The start of a stage: finds its parent, checks it before training, and loads its parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm3 import __version__
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import ModelConfig, RunConfig, StageConfig, as_dict
from llm3.data.chat_templates import template_hash
from llm3.errors import UserError
from llm3.files import CHECKPOINTS, INIT
from llm3.handoff import parent as handoff
from llm3.handoff.account import Account, account_for, check_function
from llm3.handoff.checkpoint import find_checkpoint
from llm3.handoff.parent import Parent
from llm3.handoff.pretrained import find_pretrained
from llm3.handoff.start import NAMED_STEPS, AnyStart, ModelStart, Start, read_start
from llm3.handoff.vocabulary import NO_CHANGE, VocabularyChange
from llm3.models.lora import with_magnitudes
from llm3.models.quantized import CODEBOOKS
from llm3.models.transformer import abstract, init
from llm3.segments import canonical
from llm3.stages.amendments import EVALUATED, amendments_in, with_amendments
from llm3.stages.evaluated import owner
from llm3.stages.experiment import Experiment
from llm3.stages.parents import parent_name
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import flatten, unflatten


def locate_parent(
    config: RunConfig, workdir: Path, name: str, in_this_run: list[str]
) -> tuple[AnyStart | None, Parent | None]:
    """The start of a stage and its parent, None for a checkpoint that this run has yet to write. Raises UserError.

    (None, None) for a stage without a parent, or with checkpoints of its own: it resumes from these.
    """
    stage, where = config.stages[name], f"config.stages.{name}.start"
    start = read_start(stage.start, workdir, where)
    resumes = bool(Checkpoints(workdir / name / CHECKPOINTS, read_only=True).steps())
    if resumes or start is None:
        return None, None
    if isinstance(start, ModelStart):
        return start, find_pretrained(start, workdir, where)
    if start.stage == INIT:
        return None, None
    if start.run.resolve() != workdir.resolve() or start.stage not in in_this_run:
        return start, find_checkpoint(start, where)
    if start.step == "best" and not config.stages[start.stage].best:
        raise UserError(f"{where}.step='best': set stages.{start.stage}.best to the metric that chooses the step")
    if start.step not in NAMED_STEPS:
        kept = kept_steps(config.stages[start.stage])
        if start.step not in kept and not config.stages[start.stage].best:
            raise UserError(
                f"{where}.step={start.step}: stage {start.stage!r} will keep the steps {', '.join(map(str, kept))} "
                f"(its steps, save_every, keep and keep_every)"
            )
    return start, None


def kept_steps(stage: StageConfig) -> list[int]:
    """The steps whose checkpoints a finished stage keeps, besides the best one and those saved by time."""
    phases = [step for step, _ in stage.unfreeze]
    multiples = range(stage.keep_every, stage.steps + 1, stage.keep_every) if stage.keep_every else ()
    saved = sorted({*range(stage.save_every, stage.steps, stage.save_every), *phases, *multiples, stage.steps})
    return sorted({*saved[-stage.keep :], *multiples})


def find_parent(experiment: Experiment, stage: Stage, in_this_run: list[str]) -> Parent | None:
    """The parent of a stage, with every leaf accounted for. Raises UserError.

    None for a stage that resumes or has no parent, and for a parent in `in_this_run`, whose checkpoint does not exist
    yet: its shapes are known and checked.
    """
    where = f"{stage.where}.start"
    start, parent = locate_parent(experiment.config, experiment.workdir, stage.name, in_this_run)
    if start is None:
        return None
    if parent is None:
        assert not isinstance(start, ModelStart)
        own = experiment.stages[start.stage]
        leaves, model, labels, change = _shapes(own.model), own.model, own.labels, NO_CHANGE
    else:
        leaves = {path: shape for path, (shape, _) in parent.leaves.items()}
        model, labels, change = parent.model, parent.labels, vocabulary_change(experiment, parent, where)
    account = account_for(_shapes(stage.model), leaves, start, where, change)
    check_function(model, stage.model, account, where)
    if "head/kernel" in account.loaded:
        handoff.check_labels(labels, stage.labels, where)
    return parent


def check_own_parent(stages: Mapping[str, Stage], stage: Stage) -> None:
    """Raise UserError if the leaves of a stage do not follow from those of its parent among `stages`, if it has one."""
    if isinstance(stage.start, Start) and parent_name(stage.config) in stages:
        own = stages[stage.start.stage]
        account = account_for(_shapes(stage.model), _shapes(own.model), stage.start, f"{stage.where}.start")
        check_function(own.model, stage.model, account, f"{stage.where}.start")


def vocabulary_change(experiment: Experiment, parent: Parent, where: str) -> VocabularyChange:
    """The change from the vocabulary of a parent to that of the run. Raises UserError if they do not fit."""
    tokenizer, new = experiment.tokenizer, experiment.config.tokenizer.add
    lacks = parent.lacks_new_tokens(tokenizer.hash, where, experiment.extends)
    return VocabularyChange(
        known=tokenizer.vocab_size - len(new),
        added=len(new) if lacks else 0,
        rows=parent.model.vocab_size,
        multiple=experiment.init_model.vocab_multiple,
    )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(canonical(abstract(model).shapes)).items()}


def check_same_data(directory: Path, stage: Stage, tokenizer_hash: str, meta: dict) -> None:
    """Raise UserError if a stage began with another tokenizer or other documents; sources may have been added.

    Also if its best step would be chosen from values that were measured on different documents.
    """
    found = stage.data.fingerprints
    now = {"tokenizer_hash": tokenizer_hash, "data": {source: found.get(source) for source in meta["data"]}}
    for key, value in now.items():
        if meta[key] != value:
            raise UserError(
                f"{directory} was trained on other data ({key}: saved {meta[key]}, now {value}): "
                f"restore the data, or use another --workdir"
            )
    best, judge = stage.config.best, owner(stage.config.best, meta["config"].get(EVALUATED, ()))
    scores = ((meta.get("scored") or {}).get("name"), (meta.get("validation") or {}).get("metric"))
    if best and best in scores and judge in changed_evaluations(stage, meta):
        raise UserError(
            f"{directory} has steps whose {best} was measured on other documents than evaluation {judge!r} now has: "
            f"restore them, or use another --workdir"
        )


def changed_evaluations(stage: Stage, meta: dict) -> list[str]:
    """The evaluations that have other documents now than when a checkpoint of the stage was saved."""
    then, now = (record.get(EVALUATED, {}) for record in (meta["config"], stage.record))
    return sorted(name for name in then.keys() & now.keys() if then[name] != now[name])


def first_params(session: Session, stage: Stage, parent: Parent | None, phase: Phase) -> tuple[dict, dict]:
    """The canonical parameters that a stage starts with, and their provenance for the metadata."""
    seed, fresh = stage.fresh_seed, tuple(sorted(flatten(phase.abstract_params)))
    provenance: dict[str, Any] = {"fresh": list(fresh)}
    if parent is None:
        params = init(phase.model, seed, session.mesh)
    else:
        where = f"{stage.where}.start"
        params, account = loaded_params(session, parent, phase.abstract_params, phase.model, seed, where)
        fresh, provenance = account.fresh, account.provenance()
        session.console.print(f"{stage.name}: starts from {parent.title}, {account.describe()}")
        for note in parent_notes(session, stage, parent):
            session.console.print(f"{stage.name}: {note}")
    if (kind := stage.config.frozen) in CODEBOOKS:
        session.console.print(f"{stage.name}: frozen kernels are rounded to their {kind} values")
        params, provenance = phase.rounded(params), provenance | {"rounded": kind}
    return with_magnitudes(params, fresh), provenance  # magnitudes of the rounded kernels


def loaded_params(
    session: Session, parent: Parent, abstract_params: dict, model: ModelConfig, seed: int, where: str
) -> tuple[dict, Account]:
    """The canonical parameters that a parent and, for fresh leaves, initialization give. Raises UserError."""
    change = vocabulary_change(session.experiment, parent, where)
    params, account = handoff.load(parent, abstract_params, where, change)
    if account.fresh:
        params = unflatten(flatten(params) | flatten(init(model, seed, session.mesh, only=account.fresh)))
    return params, account


def parent_notes(session: Session, stage: Stage, parent: Parent) -> list[str]:
    """What a user should know about a stage and its parent."""
    notes = []
    theirs, ours = parent.meta.get("chat_template"), session.experiment.library.template
    if theirs and theirs != template_hash(ours):
        now = "this run has another one" if ours else "this run has none"
        notes.append(f"the parent was trained with a chat template, and {now}")
    longest, length = parent.meta.get("model_max_length"), stage.config.sequence_length
    if longest and length > longest:
        notes.append(f"sequence_length={length} exceeds the {longest} positions that the model was made for")
    return notes


def conversed(experiment: Experiment, stage: Stage, parent: Parent | None) -> str:
    """The hash of the run's chat template, if the stage or its parent was trained on conversations; else ""."""
    own = template_hash(experiment.library.template)
    sources = [experiment.config.sources[name] for name in stage.data.caches]
    before = parent.meta.get("chat_template") if parent else ""
    return own if own == before or any(source.is_conversation for source in sources) else ""


def base_meta(experiment: Experiment, stage: Stage, parent: Parent | None) -> dict:
    """The part of the metadata that all checkpoints of a stage share."""
    return {
        "stage": stage.name,
        "kind": stage.config.kind,
        "seed": stage.given_seed,
        "parent": parent and parent.describe(experiment.workdir),
        "lineage": parent.lineage(experiment.workdir) if parent else [],
        "model_family": parent and parent.meta.get("model_family"),
        "model_max_length": parent and parent.meta.get("model_max_length"),
        "lm_head": stage.lm_head,
        "reset": ["step", "optimizer", "schedule", "data"],
        "tokenizer_hash": stage.task.tokenizer.hash,
        "chat_template": conversed(experiment, stage, parent),
        "labels": stage.labels,
        "label_sets": stage.task.label_sets is not None,
        "version": __version__,
        **now_meta(stage),
    }


def now_meta(stage: Stage) -> dict:
    """The part of the metadata that may change when a stage resumes."""
    own = {"steps": stage.config.steps, "model": as_dict(stage.model), "config": stage.record}
    own["data"] = stage.data.fingerprints
    return with_amendments(own, amendments_in(stage.record))
