"""A run that begins with somebody else's model: its first row, hand-offs, lineage, resuming, and what it refuses."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from llm3.__main__ import main
from llm3.checkpoints.load import load_stage
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.data.tokenizer import Tokenizer
from llm3.handoff.parent import load
from llm3.handoff.pretrained import find_pretrained
from llm3.handoff.start import ModelStart
from llm3.handoff.vocabulary import VocabularyChange
from llm3.models.transformer import abstract_params
from llm3.tree import flatten
from tests.helpers import tiny_folder
from tests.helpers import tiny_run as tiny

CONFIG = '''"""A tiny run from a pretrained model."""

from ml_collections import ConfigDict


def get_config():
    files = lambda name: {split: f"@texts/{name}-{split}.jsonl" for split in ("train", "validation", "test")}
    c = ConfigDict()
    c.cache_dir = "@cache"
    c.sources = dict(
        domain=dict(path="json", data_files=files("domain")),
        task=dict(path="json", data_files=files("task"), label="label"),
    )
    shape = dict(batch_size=8, sequence_length=32, log_every=2, optimizer=dict(learning_rate=1e-2, warmup_steps=1))
    c.stages = dict(
        posttrain=dict(
            kind="posttrain",
            start=dict(model="@model", fresh=[".*/lora/domain/.*"]),
            data=dict(domain=1.0),
            train="lora",
            adapters=dict(domain=dict(rank=2)),
            steps=4,
            save_every=2,
            **shape,
        ),
        finetune=dict(
            kind="finetune",
            start=dict(stage="posttrain", fresh=["head/.*"]),
            data=dict(task=1.0),
            objective="classify",
            adapters=dict(domain=dict(rank=2)),
            steps=2,
            **shape,
        ),
    )
    small = dict(sequence_length=32, batch_size=8)
    c.evaluations = dict(
        domain=dict(kind="perplexity", source="domain", max_documents=4, **small),
        task=dict(kind="classification", source="task", split="test", max_documents=8, **small),
    )
    return c
'''


NO_EVALUATIONS = "--config.evaluations={}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pretrained model, texts, and a config over both."""
    base = tmp_path_factory.mktemp("world")
    tiny.write_texts(base / "texts")
    folder = tiny_folder.write_folder(base / "model", tiny.documents())
    config = base / "config.py"
    config.write_text(CONFIG.replace("@", f"{base}/"))
    return types.SimpleNamespace(base=base, folder=folder, config=str(config), run=base / "run")


@pytest.fixture(scope="module")
def world(files):
    """A whole run from the model."""
    tiny.process(command(files, "run", files.run))
    return files


def command(world, verb: str, workdir, *overrides: str) -> list[str]:
    return [verb, f"--config={world.config}", f"--workdir={workdir}", *(f"--config.{each}" for each in overrides)]


def meta_of(run, stage: str) -> dict:
    checkpoints = Checkpoints(run / stage / "checkpoints", read_only=True)
    return checkpoints.meta(checkpoints.latest())


@pytest.mark.slow
def test_the_first_row_is_the_model_as_it_came(world):
    matrix = json.loads((world.run / "matrix.json").read_text())
    start, posttrain, finetune = matrix["rows"]
    assert [start["stage"], posttrain["parent"], finetune["parent"]] == ["start", "start", "posttrain"]
    assert start["tokens"] == 0 and start["task_accuracy"] is None and finetune["task_accuracy"] is not None
    change = posttrain["domain_bits_per_byte"] - start["domain_bits_per_byte"]
    assert posttrain["domain_bits_per_byte_change"] == change < 0
    assert not (world.run / "init").exists()
    assert "**posttrain**, from start:" in (world.run / "report.md").read_text()


@pytest.mark.slow
def test_frozen_leaves_are_those_of_the_files_and_layers_are_theirs(world):
    params, model, meta = load_stage(world.run, "posttrain")
    leaves, files = flatten(params), tiny_folder.tensors()
    np.testing.assert_array_equal(leaves["embed/embedding"], files["model.embed_tokens.weight"])
    for layer in range(2):
        query = files[f"model.layers.{layer}.self_attn.q_proj.weight"].T.reshape(16, 2, 8)
        np.testing.assert_array_equal(leaves["layers/attention/query/kernel"][layer], query)
    assert (model.vocab_size, model.kv_heads, model.layers) == (tiny_folder.ROWS, 1, 2)
    assert meta["fresh"] == [path for path in leaves if "/lora/" in path] and meta["dropped"] == []


@pytest.mark.slow
def test_the_lineage_names_the_model_its_family_and_the_digest_of_its_files(capsys, world):
    meta, child = meta_of(world.run, "posttrain"), meta_of(world.run, "finetune")
    kept = json.loads((world.run / "start" / "model.json").read_text())
    link = {
        "model": str(world.folder),
        "revision": None,
        "family": "llama",
        "params_digest": kept["digest"],
    }
    assert meta["parent"] == link and meta["lineage"] == [link] == child["lineage"][:1]
    for each in (meta, child):
        assert (each["model_family"], each["model_max_length"]) == ("llama", 64)
        assert each["tokenizer_hash"] == Tokenizer.load(world.folder / "tokenizer.json").hash
    assert main(["lineage", f"--workdir={world.run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = f"  {world.folder} (pretrained llama, files {kept['digest'][:12]})"
    assert lines.count(shown) == 2 and "    " + f"{world.run}/posttrain step 4" in "\n".join(lines)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(world, tmp_path):
    command_line = [*command(world, "run", tmp_path / "run"), NO_EVALUATIONS]
    said = tiny.process(command_line, deaths=["SIGKILL@saved:posttrain:2"]).stdout
    assert "posttrain: resumes at step 2" in said
    assert tiny.digests(tmp_path / "run") == tiny.digests(world.run)


@pytest.mark.slow
def test_a_finished_run_needs_the_folder_no_more(capsys, world):
    away = world.base / "away"
    world.folder.rename(away)
    try:
        assert main(command(world, "run", world.run)) == 0
        assert "Nothing left to do" in capsys.readouterr().out
        assert main(command(world, "eval", world.run)) == 0
        assert "posttrain" in capsys.readouterr().out
        assert main(["generate", f"--workdir={world.run}", "--stage=posttrain", "--prompt=The", "--max_tokens=2"]) == 0
        assert capsys.readouterr().out.startswith("The")
    finally:
        away.rename(world.folder)


SECOND = (
    "stages={'second': {'kind': 'finetune', 'start': {'run': 'RUN', 'stage': 'posttrain', 'fresh': ['head/.*'], "
    "'drop': ['.*/lora/.*']}, 'data': {'task': 1.0}, 'objective': 'classify', 'steps': 1, 'batch_size': 8, "
    "'sequence_length': 32, 'train': 'top(1)'}}"
)


@pytest.mark.slow
def test_another_run_takes_over_the_model_and_the_tokenizer_of_a_run_that_began_so(world, tmp_path):
    changes = (SECOND.replace("RUN", str(world.run)), "model.scan_unroll=2", "evaluations={}")
    tiny.process(command(world, "run", tmp_path, *changes))
    meta = meta_of(tmp_path, "second")
    assert [link.get("stage", link.get("model")) for link in meta["lineage"]] == [str(world.folder), "posttrain"]
    assert (meta["model_family"], meta["model"]["vocab_size"], meta["model"]["kv_heads"]) == ("llama", 304, 1)
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == meta_of(world.run, "posttrain")["tokenizer_hash"]


def test_a_plan_needs_no_weights(capsys, files, tmp_path):
    assert main(command(files, "plan", tmp_path / "a", "stages.posttrain.train=top(1)")) == 0
    assert "embed/embedding" in (out := capsys.readouterr().out) and "[304, 16]" in out
    assert main([*command(files, "plan", tmp_path / "b"), "--topology=h100x8", "--stages=posttrain"]) == 0
    assert "posttrain on h100x8" in capsys.readouterr().out


def start(**fields) -> str:
    return f"stages.posttrain.start={ {'model': 'MODEL', 'fresh': ['.*/lora/domain/.*'], **fields} }"


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """A run that has only post-trained."""
    run = tmp_path_factory.mktemp("begun") / "run"
    return shutil.copytree(world.run, run, ignore=shutil.ignore_patterns("finetune"))


FROM_MODEL = "stages.finetune.start={'model': 'MODEL', 'fresh': ['head/.*', '.*/lora/.*']}"


@pytest.mark.slow
def test_a_model_may_be_moved_but_not_replaced_once_a_run_has_begun(capsys, world, begun, tmp_path):
    moved = shutil.copytree(world.folder, tmp_path / "moved")
    other = tiny_folder.write_folder(tmp_path / "other", tiny.documents(), seed=1)
    options = ["--stages=finetune", "--config.stages.finetune.steps=1", NO_EVALUATIONS]
    for folder, status in ((other, 2), (moved, 0)):
        run = shutil.copytree(begun, tmp_path / f"run-{folder.name}")
        before = tiny.files(run)
        texts = [f"stages.posttrain.start.model={folder}", FROM_MODEL.replace("MODEL", str(folder))]
        assert main([*command(world, "run", run, *texts), *options]) == status
        error = capsys.readouterr().err
        if status:
            assert "has changed since this run began" in error and str(other) in error
            assert tiny.files(run) == before


def test_a_task_head_in_the_files_is_loaded_measured_and_fitted_on(files, tmp_path):
    """Fine-tuning alone is a whole run. The classes in config.json have to be those of the data."""
    folder, classes = tmp_path / "model", {"0": "domain", "1": "general"}
    tiny_folder.write_folder(
        folder, tiny.documents(), architectures=["LlamaForSequenceClassification"], id2label=classes
    )
    score = np.random.default_rng(5).normal(0, 0.3, (2, 16)).astype(np.float32)
    tiny_folder.add_tensors(folder, {"score.weight": score})
    stage = {"kind": "finetune", "data": {"task": 1.0}, "objective": "classify", "sequence_length": 32, "batch_size": 8}
    stage |= {"start": {"model": str(folder)}, "steps": 1, "train": "biases"}
    assert main(command(files, "run", tmp_path / "run", f"stages={ {'finetune': stage} }")) == 0
    start, finetune = json.loads((tmp_path / "run" / "matrix.json").read_text())["rows"]
    assert start["stage"] == "start" and None not in (start["task_accuracy"], finetune["task_accuracy"])
    params, _, meta = load_stage(tmp_path / "run", "finetune")
    np.testing.assert_array_equal(params["head"]["kernel"], score.T)
    assert meta["labels"] == ["domain", "general"] and meta["fresh"] == []


def test_new_tokens_take_the_spare_rows_and_start_at_the_mean_of_the_tokens(files, tmp_path, eight_devices):
    """The files have 304 rows for 300 tokens; with 6 new tokens, the embedding has 306, padded for the mesh."""
    parent = find_pretrained(ModelStart(str(files.folder), None, (), ()), tmp_path, "start")
    model = dataclasses.replace(parent.model, vocab_size=306, vocab_multiple=8)
    change = VocabularyChange(known=300, added=6, rows=304, multiple=8)
    params, account = load(parent, abstract_params(model, eight_devices), "start", change)
    rows, before = params["embed"]["embedding"], tiny_folder.tensors()["model.embed_tokens.weight"]
    assert rows.shape == (312, 16) and account.extended == ("embed/embedding",) and len(rows.sharding.device_set) == 8
    np.testing.assert_array_equal(rows[:300], before[:300])
    np.testing.assert_allclose(rows[300:306], [before[:300].mean(0)] * 6, atol=1e-6)
    np.testing.assert_array_equal(rows[306:], 0)
    kept, _ = load(parent, abstract_params(parent.model, eight_devices), "start", VocabularyChange(known=300, rows=304))
    np.testing.assert_array_equal(kept["embed"]["embedding"], before)


def without(folder, name):
    (folder / name).unlink()


def described(folder, **changes):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | changes))


WRONG = {
    "model and stage": ((start(stage="a"),), "config.stages.posttrain.start: model='MODEL' and stage='a' name two"),
    "unknown key": ((start(revison="a"),), "start.revison: no such field; did you mean 'revision'"),
    "a revision of a checkpoint": (
        ("stages.finetune.start={'stage': 'posttrain', 'revision': 'main'}",),
        "config.stages.finetune.start.revision: needs `model`",
    ),
    "pretraining": (
        ("stages.posttrain.kind=pretrain",),
        "a pretrain stage starts from nothing; did you mean posttrain?",
    ),
    "no such model": ((start(model="MODELS"),), "config.stages.posttrain.start.model='MODELS': "),
    "no name": ((start(model=3),), "start.model=3: expected a Hugging Face folder, or a name on the hub"),
    "a revision of a folder": ((start(revision="main"),), "revision"),
    "two models": (
        ("stages.finetune.start={'model': 'OTHER', 'fresh': ['head/.*', '.*/lora/.*']}",),
        "config.stages.finetune.start: model='OTHER', revision=None, but stage 'posttrain' has model='MODEL'",
    ),
    "a field of the model": (("model.layers=3",), "config.model.layers=3: MODEL has 2; leave it out"),
    "a misspelt field": (("model.layer=3",), "config.model.layer: no such field; did you mean 'layers'"),
    "replay": (("stages.posttrain.replay=0.1",), "the data of a pretrained model is not known"),
    "a missing head": (
        ("stages.finetune.start={'model': 'MODEL', 'fresh': ['.*/lora/.*']}",),
        "add to start: fresh=['.*/lora/.*', 'head/.*']",
    ),
    "missing adapters": ((start(fresh=[]),), "add to start: fresh=['.*/lora/domain/.*']"),
    "a tokenizer of another model": (
        ("tokenizer.path=LARGER",),
        "config.tokenizer: the tokenizer has 310 tokens, but the model to start from has an embedding of 304 rows",
    ),
    "another family": ((), "config.stages.posttrain.start.model='MODEL'", lambda f: described(f, model_type="mamba")),
    "no weights": ((), "start.model='MODEL'", lambda folder: without(folder, "model.safetensors")),
    "no tokenizer": ((), "tokenizer", lambda folder: without(folder, "tokenizer.json")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_start_is_refused_on_one_line_and_leaves_no_trace(capsys, monkeypatch, tmp_path, files, case):
    overrides, message, *damage = WRONG[case]
    places = {"MODELS": tmp_path / "models", "MODEL": tmp_path / "model", "OTHER": tmp_path / "other"}
    for name in ("model", "other"):
        shutil.copytree(files.folder, tmp_path / name)
    places["LARGER"] = larger_tokenizer(tmp_path / "larger", files) if "LARGER" in str(overrides) else tmp_path
    for change in damage:
        change(tmp_path / "model")
    before = tiny.files(tmp_path)
    monkeypatch.setattr("llm3.cli.run.evaluate_first_rows", lambda *_: pytest.fail("the run began"))
    text = "stages.posttrain.start.model=MODEL"
    arguments = command(files, "run", tmp_path / "run", text, *overrides)
    for name, place in places.items():
        arguments = [each.replace(name, str(place)) if "--config." in each else each for each in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    for name, place in places.items():
        error = error.replace(str(place), name)
    assert message in error, error
    assert len(error.strip().splitlines()) == 1 or "does not fit this model" in error
    assert tiny.files(tmp_path) == before


def larger_tokenizer(folder, files):
    tokenizer = Tokenizer.load(files.folder / "tokenizer.json").extended([f"word{i}" for i in range(10)])
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_an_export_has_the_layout_and_the_tokenizer_that_came(world, tmp_path, capsys):
    for stage, form in (("posttrain", "base"), ("finetune", "merged"), ("posttrain", "adapters")):
        to = tmp_path / f"{stage}-{form}"
        flags = (f"--workdir={world.run}", f"--stage={stage}", f"--to={to}", f"--format={form}")
        assert main(["export", *flags]) == 0
    base, files = load_file(tmp_path / "posttrain-base" / "model.safetensors"), tiny_folder.tensors()
    assert base.keys() == files.keys(), "only adapters were trained, and they are left out"
    for name, value in files.items():
        np.testing.assert_array_equal(base[name], value, err_msg=name)
    described = json.loads((tmp_path / "finetune-merged" / "config.json").read_text())
    assert described["architectures"] == ["LlamaForSequenceClassification"] and len(described["id2label"]) > 1
    assert described["max_position_embeddings"] == 64
    for name in ("tokenizer.json", "tokenizer_config.json"):
        came = json.loads((world.folder / name).read_text())
        assert json.loads((tmp_path / "posttrain-base" / name).read_text()) == came, name
    assert (tmp_path / "posttrain-adapters" / "domain" / "adapter_model.safetensors").is_file()
    assert "score.weight" in load_file(tmp_path / "finetune-merged" / "model.safetensors")
