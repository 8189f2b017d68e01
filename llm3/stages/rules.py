"""The rules of the three kinds of stages, and the order of the stages of a run."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.config.schema import EvaluationConfig, RunConfig, StageConfig
from llm3.distributed.mesh_axes import check_across_hosts, table
from llm3.errors import UserError, counted, nearest
from llm3.files import INIT
from llm3.handoff.start import ModelStart, read_start
from llm3.registry import check_known, check_package, declared, plugin_names, read_options
from llm3.stages.parents import model_starts, origin, parent_name

PARENTS = "start={!r}, dict(run=, stage=), or dict(model=) for a pretrained model"


def pretrain(stage: StageConfig, where: str) -> None:
    """A pretrain stage builds general knowledge from unlabelled text; it has no parent."""
    if stage.start is not None:
        raise UserError(f"{where}.start={stage.start!r}: a pretrain stage starts from nothing; did you mean posttrain?")
    if declared("objectives", stage.objective_name).LABELLED:
        raise UserError(f"{where}.objective={stage.objective_name!r}: a pretrain stage learns from unlabelled text")
    if not trains_all(stage) or stage.adapters:
        field = "adapters" if trains_all(stage) else "unfreeze" if stage.unfreeze else "train"
        raise UserError(f"{where}.{field}={getattr(stage, field)!r}: a pretrain stage trains 'all' of the plain model")


def posttrain(stage: StageConfig, where: str) -> None:
    """A posttrain stage adds a domain to its parent."""
    if stage.start is None:
        raise UserError(f"{where}.start: a posttrain stage needs a parent: {PARENTS.format('pretrain')}")


def finetune(stage: StageConfig, where: str) -> None:
    """A finetune stage fits one task with few labels, from a parent or, as a baseline, from the untrained model."""
    if stage.start is None:
        raise UserError(f"{where}.start: a finetune stage needs a parent: {PARENTS.format('posttrain')}")
    labelled = ", ".join(name for name in plugin_names("objectives") if declared("objectives", name).LABELLED)
    if not declared("objectives", stage.objective_name).LABELLED:
        raise UserError(
            f"{where}.objective={stage.objective_name!r}: a finetune stage fits a labelled task ({labelled})"
        )


RULES: dict[str, Callable[[StageConfig, str], None]] = {
    "pretrain": pretrain,
    "posttrain": posttrain,
    "finetune": finetune,
}


def _known(field: str, name: str, options: Collection[str]) -> None:
    if name not in options:
        raise UserError(f"{field}={name!r}: {nearest(name, options)}")


def check(config: RunConfig) -> list[str]:
    """Check every stage against its rules; returns the names of the stages as `parents_first`. Raises UserError."""
    if (matmul := config.model.matmul) != "compute":
        check_package("qwix", "qwix", f"config.model.matmul={matmul!r}")
    return check_stages(config, config.model.causal)


def check_stages(config: RunConfig, causal: bool | None) -> list[str]:
    """`check` for a model with causal or bidirectional attention; None: the model is not known yet."""
    stages = config.stages
    if not stages:
        raise UserError("config.stages is empty: expected {name: stage}")
    table(config.mesh.rules)
    check_across_hosts(config.mesh.across_hosts)
    for name, evaluation in config.evaluations.items():
        where = f"config.evaluations.{name}"
        check_known("evals", evaluation.kind, f"{where}.kind")
        plugin, kind = declared("evals", evaluation.kind), f"{where}.kind={evaluation.kind!r}"
        check_attention(plugin.CAUSAL, causal, kind)
        if plugin.WINDOWS:
            _known(f"{where}.source", evaluation.source, config.sources)
            window_kind(plugin.WINDOWS, config.sources[evaluation.source], kind, evaluation.source)
        else:
            check_no_source(evaluation, where)
        read_options(plugin, evaluation.options, f"{where}.options")
    for name, stage in stages.items():  # of all stages, before any stage replays its parent's
        for source in own_sources(stage):
            _known(f"config.stages.{name}.data", source, config.sources)
    for name, stage in stages.items():
        where = f"config.stages.{name}"
        check_known("objectives", stage.objective_name, f"{where}.objective")
        plugin = declared("objectives", stage.objective_name)
        check_attention(plugin.CAUSAL, causal, f"{where}.objective={stage.objective_name!r}")
        read_options(plugin, stage.objective_options, f"{where}.objective")
        for source in data_sources(config, name):
            window_kind(plugin.WINDOWS, config.sources[source], f"{where}.objective={stage.objective_name!r}", source)
        check_rules(stage, where)
        RULES[stage.kind](stage, where)
        if isinstance(read_start(stage.start, Path(), f"{where}.start"), ModelStart) and stage.replay:
            raise UserError(
                f"{where}.replay={stage.replay}: the data of a pretrained model is not known; name general text in "
                f"{where}.data"
            )
        parent = parent_name(stage)
        if parent == INIT and not stage.baseline:
            raise UserError(f"{where}.start='{INIT}': only a baseline (baseline=True) starts from the untrained model")
        if parent is not None and parent not in (INIT, *stages):
            raise UserError(f"{where}.start={parent!r}: no such stage in this config; {nearest(parent, stages)}")
    model_starts(config)
    tokenizer = config.tokenizer
    if tokenizer.add and not tokenizer.path and origin(config) is None:
        raise UserError(f"config.tokenizer.add={tokenizer.add}: needs tokenizer.path, the tokenizer to extend")
    return parents_first(stages)


def parents_first(stages: Mapping[str, StageConfig]) -> list[str]:
    """The names of the stages in the order of the config, each after its parent. Raises UserError for a cycle."""
    ordered: list[str] = []
    for name in stages:
        chain: list[str] = []
        each: str | None = name
        while each is not None and each not in (INIT, *ordered):
            if each in chain:
                cycle = sorted(chain[chain.index(each) :])
                raise UserError(f"config.stages: {', '.join(cycle)} start from one another in a cycle")
            chain.append(each)
            each = parent_name(stages[each])
        ordered += reversed(chain)
    return ordered


def check_best(config: RunConfig, stage: StageConfig, where: str) -> None:
    """Raise UserError unless `best` and `eval_names` are empty or of evaluations that fit the stage's task head."""
    if stage.best:
        check_metric(config, stage, stage.best, f"{where}.best")
    if stage.eval_every:
        check_eval_names(stage, [*fitting_evaluations(config, stage)], where)


def fitting_evaluations(config: RunConfig, stage: StageConfig) -> dict[str, Any]:
    """{evaluation: its plugin} of those that fit the stage's task head."""
    head = declared("objectives", stage.objective_name).HEAD
    plugins = {name: declared("evals", evaluation.kind) for name, evaluation in config.evaluations.items()}
    return {name: each for name, each in plugins.items() if each.HEAD in ("", head)}


def check_metric(config: RunConfig, stage: StageConfig, metric: str, where: str) -> None:
    """Raise UserError unless the row of a stage will have this metric."""
    fitting = fitting_evaluations(config, stage)
    metrics = [f"{name}_{each}" for name, plugin in fitting.items() for each in plugin.BETTER]
    later = tuple(f"{name}_" for name, plugin in fitting.items() if not plugin.BETTER)  # known once it is prepared
    if metric not in metrics and not metric.startswith(later):
        raise UserError(f"{where}={metric!r}: no such metric of this stage; {nearest(metric, metrics)}")


def check_eval_names(stage: StageConfig, fitting: list[str], where: str) -> None:
    """Raise UserError unless the stage validates with evaluations that fit its task head, and with that of `best`."""
    if not fitting:
        raise UserError(f"{where}.eval_every={stage.eval_every}: no evaluation of this config fits the stage")
    for name in stage.eval_names:
        if name not in fitting:
            raise UserError(f"{where}.eval_names: no evaluation {name!r} of this stage; {nearest(name, fitting)}")
    if stage.best and stage.eval_names and not stage.best.startswith(tuple(f"{name}_" for name in stage.eval_names)):
        raise UserError(
            f"{where}.best={stage.best!r}: its evaluation is not in eval_names={stage.eval_names}, which run while the "
            "stage trains"
        )


def check_no_source(evaluation: EvaluationConfig, where: str) -> None:
    """Raise UserError for a field that chooses documents of a source, in an evaluation that has no source."""
    for field in ("source", "split", "max_documents"):
        if (value := getattr(evaluation, field)) != getattr(EvaluationConfig, field):
            raise UserError(f"{where}.{field}={value!r}: an evaluation of kind {evaluation.kind!r} has no source")


def check_attention(needed: bool | None, causal: bool | None, what: str) -> None:
    """Raise UserError if an objective or evaluation needs causal or bidirectional attention and the model differs.

    causal: None if the model is not known yet.
    """
    if needed is True and causal is False:
        raise UserError(f"{what}: a bidirectional model (model.causal=False) sees the tokens that it should predict")
    if needed is False and causal:
        raise UserError(f"{what}: needs a bidirectional model: model.causal=False, pool='mean' or 'first'")


def window_kind(kinds: dict[str, str], source: SourceConfig, what: str, name: str) -> str:
    """The kind of windows that an objective or evaluation cuts a source into. Raises UserError for unsupported rows."""
    if source.row_format not in kinds:
        raise UserError(
            f"{what}: takes {' or '.join(sorted(kinds))} rows, but source {name!r} has {source.row_format} rows; "
            "see sources.*.text, prompt, answer, messages, choices and answers"
        )
    return kinds[source.row_format]


def data_sources(config: RunConfig, name: str) -> list[str]:
    """The sources that a stage draws from at any step, including its parent's if it replays them."""
    stage = config.stages[name]
    drawn = own_sources(stage)
    if stage.replay and (parent := parent_name(stage)) in config.stages:
        drawn += [source for source in config.stages[parent].data if source not in drawn]
    return drawn


def own_sources(stage: StageConfig) -> list[str]:
    """The sources that a stage names itself."""
    return list(dict(stage.data) | {source: None for _, weights in stage.data_schedule for source in weights})


def trains_all(stage: StageConfig) -> bool:
    """Whether a stage trains all parameters from its first step."""
    return stage.train in ("all", ["all"]) and not stage.unfreeze


def check_rules(stage: StageConfig, where: str) -> None:
    """Raise UserError unless `train` is a rule or a list of rules, and `unfreeze` has pairs [step, rule or rules]."""

    def is_rule(value: Any) -> bool:
        rules = [value] if isinstance(value, str) else value
        return isinstance(rules, list | tuple) and bool(rules) and all(isinstance(rule, str) for rule in rules)

    if not is_rule(stage.train):
        raise UserError(f"{where}.train={stage.train!r}: expected a rule, or a list of rules")
    steps = [0]
    for pair in stage.unfreeze:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is int and is_rule(pair[1])):
            raise UserError(f"{where}.unfreeze: {pair!r}: expected a pair [step, rule or list of rules]")
        if not steps[-1] < pair[0] < stage.steps:
            raise UserError(
                f"{where}.unfreeze: step {pair[0]}: expected ascending steps after 0 and before the "
                f"{counted(stage.steps, 'step')}"
            )
        steps.append(pair[0])


def chosen(config: RunConfig, names: list[str] | None) -> list[str]:
    """The stages to run, parents first. Raises UserError for a name that is not in the config."""
    order = check(config)
    for name in names or ():
        if name not in order:
            raise UserError(f"--stages={name}: no such stage; {nearest(name, order)}")
    order = [name for name in order if not names or name in names]
    for name in order:
        check_best(config, config.stages[name], f"config.stages.{name}")
    return order
