"""Every objective, evaluation, form of row and kind of window, held to the contract of its folder."""

import dataclasses
import inspect
import json
import types

import pytest

from llm3 import config_folder, evals, objectives
from llm3.__main__ import main
from llm3.cli.plugin_checks import CHECKS, Subject
from llm3.cli.verbs import VERBS
from llm3.config.checks import OPTIMIZERS, SCHEDULES
from llm3.config.data_schema import SourceConfig
from llm3.config.load import load
from llm3.data import formats, windows
from llm3.errors import UserError
from llm3.optim.learning_rates import SHAPES
from llm3.optim.update_rules import RULES
from llm3.predict import kinds
from llm3.predict.fields import FLAGS
from llm3.registry import DECLARED, declared, load_plugin, plugin_names, read_options
from llm3.stages import rules
from llm3.stages.experiment import prepare
from tests.helpers import tiny_run as tiny

FOLDERS = (objectives, evals)
PEERS = [(folder, name) for folder in FOLDERS for name in plugin_names(folder)]
each_plugin = pytest.mark.parametrize(("folder", "name"), PEERS, ids=[f"{f.__name__}.{n}" for f, n in PEERS])


def test_the_peers_are_the_files_of_the_folder():
    assert set(plugin_names(objectives)) >= {"causal", "classify", "instruct", "masked", "prefix", "span"}
    assert set(plugin_names(evals)) >= {"choice", "classification", "generation", "masked", "perplexity", "span"}
    assert set(plugin_names(formats)) == {"choice", "dialogue", "span", "text"}
    assert set(plugin_names(windows)) == {"dialogue", "examples", "pieces", "spans", "stream"}


@pytest.mark.parametrize("folder", [*FOLDERS, formats, windows], ids=lambda folder: folder.__name__)
def test_an_unknown_peer_is_an_error_with_the_nearest_name(folder):
    name = plugin_names(folder)[0]
    with pytest.raises(UserError, match=f"{name}x.*did you mean '{name}'"):
        load_plugin(folder, f"{name}x")


def subject_of(folder, name):
    plugin = load_plugin(folder, name)
    return Subject(plugin, read_options(plugin, {}, name))


@pytest.mark.parametrize(
    ("folder", "name", "check"),
    [(folder, name, check) for folder, name in PEERS for check in CHECKS[folder.__name__.rpartition(".")[2]]],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_plugin_holds_to_the_checks_that_those_of_users_are_held_to(folder, name, check):
    check(subject_of(folder, name))


@each_plugin
def test_what_a_plugin_declares_is_known_without_its_imports(folder, name):
    plugin, found = load_plugin(folder, name), declared(folder.__name__.rpartition(".")[2], name)
    assert isinstance(found, types.SimpleNamespace), "its declarations needed the whole file"
    for constant in set(DECLARED) - {"Options"}:
        assert getattr(found, constant, None) == getattr(plugin, constant, None)
    assert hasattr(found, "Options") == hasattr(plugin, "Options")
    if hasattr(plugin, "Options"):
        assert dataclasses.asdict(found.Options()) == dataclasses.asdict(plugin.Options())


def test_names_that_a_config_is_checked_against_are_those_of_the_code():
    assert set(OPTIMIZERS) == set(RULES) and set(SCHEDULES) == set(SHAPES)


@pytest.mark.parametrize("name", plugin_names(formats))
def test_a_row_format_reads_encodes_and_names_its_texts(name):
    plugin = load_plugin(formats, name)
    assert list(inspect.signature(plugin.read_row).parameters) == ["row", "source"]
    assert list(inspect.signature(plugin.encode).parameters) == ["record", "tokenizer", "template"]
    assert list(inspect.signature(plugin.texts).parameters) == ["record"]
    assert list(inspect.signature(plugin.read_input).parameters) == ["row", "source"]
    assert list(inspect.signature(plugin.columns).parameters) == ["source"]
    assert set(FLAGS[name]) <= {field.name for field in dataclasses.fields(SourceConfig)}


@pytest.mark.parametrize("name", plugin_names(kinds))
def test_a_kind_of_predictions_has_what_its_folder_promises(name):
    plugin = load_plugin(kinds, name)
    assert plugin.__doc__ and plugin.ROWS >= 1 and set(plugin.FORMATS) <= set(plugin_names(formats))
    signatures = {
        "least_length": ["options"],
        "refusal": ["trained"],
        "read": ["row", "fields"],
        "encode": ["record", "fields", "trained", "tokenizer", "options"],
        "columns": ["trained", "options"],
        "predict": ["session", "items"],
    }
    for function, parameters in signatures.items():
        assert list(inspect.signature(getattr(plugin, function)).parameters) == parameters
    if hasattr(plugin, "Options"):
        flags = {flag.removeprefix("--") for flag, _ in VERBS["predict"].flags}
        assert {field.name for field in dataclasses.fields(plugin.Options)} <= flags


@pytest.mark.parametrize(
    ("fields", "row_format"),
    [
        ({}, "text"),
        ({"label": "kind", "pair": "other"}, "text"),
        ({"prompt": "q", "answer": "a"}, "dialogue"),
        ({"messages": "turns"}, "dialogue"),
        ({"prompt": "q", "answer": "a", "choices": ["yes", "no"]}, "choice"),
        ({"prompt": "q", "answers": "spans"}, "span"),
    ],
)
def test_the_named_fields_decide_the_row_format(fields, row_format):
    assert SourceConfig("hub/name", **fields).row_format == row_format


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.__name__)
def test_an_unknown_option_is_an_error_with_the_nearest_name(folder):
    plugin = load_plugin(folder, "masked")
    with pytest.raises(UserError, match=r"where\.shar: no such option; did you mean 'share'"):
        read_options(plugin, {"shar": 0.1}, "where")


GOOD = """
\"\"\"The next token, with label smoothing.\"\"\"
import dataclasses
import jax.numpy as jnp
from llm3.objectives import Sums
from llm3.objectives.causal import token_losses

WINDOWS, HEAD, LABELLED, CAUSAL = {"text": "stream"}, "", False, True


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = 2.0


def scaled(model, batch, key, task):
    \"\"\"The loss times the option.\"\"\"
    losses = task.options.scale * token_losses(model, batch, key)
    return Sums(jnp.sum(losses * batch.weights), jnp.sum(batch.weights), {})


class Held:
    \"\"\"The same as a class.\"\"\"
    WINDOWS, HEAD, LABELLED, CAUSAL, Options, loss = {"text": "stream"}, "", False, True, Options, scaled


def mean(model, batch, key, task):
    \"\"\"A mean, which depends on the batch.\"\"\"
    found = scaled(model, batch, key, task)
    return found._replace(loss=found.loss / jnp.maximum(found.weight, 1))


def zero_by_zero(model, batch, key, task):
    \"\"\"Not a number without a target.\"\"\"
    found = scaled(model, batch, key, task)
    return found._replace(metrics={"ratio": found.loss / found.weight * found.weight})


def across(model, batch, key, task):
    \"\"\"Reads what is in the rest of the window.\"\"\"
    found = scaled(model, batch, key, task)
    return found._replace(loss=found.loss * jnp.max(batch.segments))


def constant(model, batch, key, task):
    \"\"\"Does not depend on the parameters.\"\"\"
    return Sums(jnp.sum(batch.weights), jnp.sum(batch.weights), {})


def bits_per_byte(context):
    \"\"\"An evaluation.\"\"\"
    return {"x": 1.0}


BETTER = {"x": "higher"}
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """A package of losses in the working directory."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "losses.py").write_text(GOOD.lstrip(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = config_folder.current()
    yield tmp_path
    config_folder.enter(before)


@pytest.mark.parametrize(
    ("name", "failures"),
    [
        ("scaled", []),
        ("Held", []),
        ("mean", ["a batch and its rows", "packed documents", "three times the weights"]),
        ("zero_by_zero", ["ratio of rows without weights is nan"]),
        ("across", ["packed documents"]),
        ("constant", ["the gradient is zero"]),
        ("bits_per_byte --kind=evaluation", []),
    ],
)
def test_check_plugin_tells_what_a_plugin_does_not_hold_to(losses, capsys, name, failures):
    name, *flags = name.split()
    assert main(["check-plugin", f"my_package.losses:{name}", *flags]) == (2 if failures else 0)
    out = capsys.readouterr().out
    assert out.count("FAILED") == len(failures), out
    assert all(each in out for each in failures) and ("all checks hold" in out) == (not failures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("my_package.loses:scaled", "there is no module my_package.loses"),
        ("my_pakage.losses:scaled", "did you mean 'my_package'"),
        ("my_package.losses:scald", "my_package.losses has no scald; did you mean 'scaled'"),
        ("my_package:losses", "my_package has no losses"),
        ("my_package.losses --kind=objective", "lacks loss; the docstring of llm3/objectives/__init__.py"),
        ("my_package.losses:scaled --options={'scal':1}", "--options.scal: no such option; did you mean 'scale'"),
        ("causl", "objective 'causl': did you mean 'causal'"),
        ("masked", "expected --kind=objective or evaluation"),
        ("causal --kind=objectiv", "--kind=objectiv: did you mean 'objective'"),
    ],
)  # fmt: skip
def test_a_plugin_that_is_not_there_is_an_error_with_the_nearest_name(losses, capsys, arguments, message):
    assert main(["check-plugin", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_config_names_plugins_by_their_import_path(losses):
    tiny.write_texts(losses / "texts")
    extra = """
c.stages = {"pretrain": c.stages.pretrain.to_dict() | dict(objective=dict(name="my_package.losses:scaled", scale=3.0))}
c.evaluations = dict(general=dict(kind="my_package.losses:bits_per_byte", source="general"))
""".strip()
    file = str(tiny.write_config(losses / "config.py", losses, extra))
    config = load(file)
    assert rules.chosen(config, None) == ["pretrain"]
    stage = prepare(config, losses, ["pretrain"]).stages["pretrain"]
    assert stage.task.options.scale == 3.0 and stage.objective.loss.__name__ == "scaled"
    assert stage.record["stage"]["objective"]["name"] == "my_package.losses:scaled"
    with pytest.raises(
        UserError, match=r"config.stages.pretrain.objective: .*my_package.losses has no scalet; did you"
    ):
        rules.check(load(file, ["stages.pretrain.objective=my_package.losses:scalet"]))


OWN = {
    "hard": """
\"\"\"The next token, and the share of the targets that cost much.\"\"\"
import dataclasses
import jax.numpy as jnp
from llm3.objectives import Sums
from llm3.objectives.causal import token_losses

WINDOWS, HEAD, LABELLED, CAUSAL = {"text": "stream"}, "", False, True


@dataclasses.dataclass(frozen=True)
class Options:
    nats: float = 1.0


def loss(model, batch, key, task):
    losses = token_losses(model, batch, key)
    hard = jnp.sum((losses > task.options.nats) * batch.weights)
    return Sums(jnp.sum(losses * batch.weights), jnp.sum(batch.weights), {"hard_share": hard})
""",
    "surprise": """
\"\"\"The nats of a document for each of its bytes, the mean over documents and its standard error.\"\"\"
from llm3.evals import by_item, segment_sums
from llm3.objectives.causal import token_losses

WINDOWS, HEAD, CAUSAL, BETTER = {"text": "pieces"}, "", True, {"mean_surprise": "lower"}


def sums(model, batch, *, segments):
    return {"nats": segment_sums(token_losses(model, batch) * batch.weights, batch, segments)}


def evaluate(context):
    nats = context.by_document(sums)["nats"] / context.cache.document_bytes
    found = {"mean_surprise": float(nats.mean())}
    return found | {"predictions": by_item({"nats": nats}, context.cache.rows)}
""",
}


@pytest.mark.slow
def test_a_run_with_plugins_by_import_path_resumes_after_a_kill_and_reports_their_metrics(losses):
    for name, text in OWN.items():
        (losses / "my_package" / f"{name}.py").write_text(text.lstrip(), encoding="utf-8")
    tiny.write_texts(losses / "texts")
    extra = """
c.stages = {"pretrain": c.stages.pretrain.to_dict() | dict(objective=dict(name="my_package.hard", nats=5.0))}
c.evaluations = dict(held_out=dict(c.evaluations.general.to_dict(), kind="my_package.surprise"))
""".strip()
    config, workdir = tiny.write_config(losses / "config.py", losses, extra), losses / "run"
    common = (f"--config={config}", f"--workdir={workdir}")
    done = tiny.process(
        ("run", *common),
        ("eval", *common, "--json"),
        ("generate", common[1], "--prompt=The president", "--max_tokens=4"),
        ("report", workdir),
        deaths=["SIGKILL@saved:pretrain:4", "SIGKILL@log:pretrain:6"],
    )
    *_, killed, ended = done.stdout.split(tiny.KILLED)
    ran, evaluated, generated, reported, _ = ended.split(tiny.NEXT)
    assert "pretrain: resumes at step 4" in killed and "pretrain: resumes at step 4" in ran
    assert "hard share" in ran, "the progress line has the objective's own metric"
    shares = {line["step"]: line["hard_share"] for line in tiny.metrics(workdir / "pretrain")}
    assert list(shares) == [2, 4, 6, 8, 10] and 0 < shares[10] < shares[2] <= 1
    rows = tiny.rows(workdir)
    surprise = rows["pretrain"]["held_out_mean_surprise"]
    assert 0 < surprise < rows["init"]["held_out_mean_surprise"]
    assert json.loads(evaluated)["held_out_mean_surprise"] == surprise
    assert "The president" in generated and "Report: " in reported
    report = (workdir / "report.md").read_text(encoding="utf-8")
    assert "pretrain has the lowest mean surprise" in report
    assert "| stage | held out mean surprise |" in report and f"| pretrain | {surprise:.3f} " in report
