"""Configs: reading, overriding, and one clear sentence for every mistake."""

import importlib.util
import pathlib

import pytest
from ml_collections import ConfigDict

from llm3.__main__ import main
from llm3.config import load as configfile
from llm3.config import schema
from llm3.errors import UserError
from llm3.stages import rules
from llm3.stages.workdir import stage_record
from tests.helpers import tiny_folder
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    tiny.write_texts(directory / "texts")
    return directory


@pytest.fixture(scope="module")
def file(base):
    return str(tiny.write_config(base / "config.py", base))


def refused(capsys, arguments: list[str]) -> str:
    """The error of a rejected command line: exit status 2, no traceback, and a single "llm3:"."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return next(line for line in error.split("\nllm3: ")[-1].split("llm3: ")[-1:])


def test_overrides_are_read_by_the_type_of_the_field(file):
    config = configfile.load(
        file,
        [
            "stages.pretrain.steps=50",
            "stages.pretrain.optimizer.learning_rate=1e-3",
            "stages.pretrain.optimizer.weight_decay=0",
            "stages.posttrain.train=top(2)",
            "stages.finetune.train=['head/.*', 'not embeddings']",
            "stages.finetune.start={'stage': 'posttrain', 'fresh': ['head/.*']}",
            "stages.posttrain.data.general=0.5",
            "stages.pretrain.optimizer.options={'b1': 0.8}",
            "model.tie_embeddings=false",
            "tokenizer.sources=['domain']",
            "sources.general.name=None",
            "mesh.fsdp=-1",
        ],
    )
    pretrain, posttrain, finetune = (config.stages[name] for name in ("pretrain", "posttrain", "finetune"))
    assert (pretrain.steps, pretrain.optimizer.learning_rate, pretrain.optimizer.options) == (50, 1e-3, {"b1": 0.8})
    assert pretrain.optimizer.weight_decay == 0.0 and isinstance(pretrain.optimizer.weight_decay, float)
    assert posttrain.train == "top(2)" and posttrain.data == {"domain": 0.9, "general": 0.5}
    assert finetune.train == ["head/.*", "not embeddings"]
    assert finetune.start == {"stage": "posttrain", "fresh": ["head/.*"]}
    assert config.model.tie_embeddings is False and config.tokenizer.sources == ["domain"]
    assert config.sources["general"].name is None and config.mesh.fsdp == -1


def test_a_config_survives_the_way_through_plain_values(file, tmp_path, monkeypatch):
    config = configfile.load(file)
    copy = tmp_path / "copy.py"
    copy.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({schema.as_dict(config)!r})\n"
    )
    assert configfile.load(str(copy)) == config
    assert isinstance(ConfigDict(schema.as_dict(config)).stages.pretrain.steps, int)


def test_sections_keep_the_order_of_the_file_and_each_stage_runs_after_its_parent(file, tmp_path):
    turned = tmp_path / "turned.py"  # "scratch" is given before the stages that it does not need, and so on
    turn = "    for name in 'stages', 'evaluations':\n        c[name] = dict(reversed(c[name].items()))\n    return c\n"
    turned.write_text(pathlib.Path(file).read_text().replace("    return c\n", turn))
    config = configfile.load(str(turned), ["stages.finetune.steps=9", "evaluations.domain.max_documents=3"])
    assert list(config.stages) == ["scratch", "pretrain", "posttrain", "finetune"]
    assert list(config.evaluations) == ["task", "general", "domain"]
    assert rules.check(config) == ["scratch", "pretrain", "posttrain", "finetune"]
    plain = configfile.load(file)
    assert rules.check(plain) == list(plain.stages) == list(tiny.STAGES)
    assert list(plain.sources) == list(plain.evaluations) == ["general", "domain", "task"]
    assert list(plain.stages["posttrain"].data) == ["domain", "general"], "what decides a result stays sorted"
    for name in tiny.STAGES[:3]:
        again = configfile.load(str(turned))
        assert stage_record(again, name) == stage_record(plain, name), "a run resumes with a config in another order"


def test_parents_come_before_stages_that_the_config_gives_first(file):
    stages = configfile.load(file).stages
    shuffled = {name: stages[name] for name in ("finetune", "scratch", "posttrain", "pretrain")}
    assert rules.parents_first(shuffled) == ["pretrain", "posttrain", "finetune", "scratch"]


def test_a_config_file_takes_an_argument(tmp_path, file):
    other = tmp_path / "sized.py"
    text = pathlib.Path(file).read_text().replace("def get_config():", "def get_config(layers='2'):")
    other.write_text(text.replace("layers=2", "layers=int(layers)"))
    assert configfile.load(str(other)).model.layers == 2
    assert configfile.load(f"{other}:5").model.layers == 5


@pytest.mark.parametrize("shipped", sorted((tiny.ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_obeys_the_laws_of_its_stages(shipped, tmp_path):
    from llm3.stages.origin import load_config

    pretrained = {"smollm2_medical": tiny_folder.write_folder, "minilm_types": tiny_folder.write_bert}
    if write := pretrained.get(shipped.stem):
        shipped = f"{shipped}:{write(tmp_path / 'model', ['A text.'] * 9)}"
    assert set(rules.check(load_config(str(shipped))))


OVERRIDES = [
    ("stages.finetun.steps=5", ["config.stages.finetun", "did you mean 'finetune'"]),
    ("stages.finetune.stesp=5", ["config.stages.finetune.stesp", "'steps'"]),
    ("modle.layers=2", ["config.modle", "'model'"]),
    ("model.layers.x=2", ["config.model.layers", "no field 'x'"]),
    ("stages.pretrain.steps", ["stages.pretrain.steps", "--config.FIELD=VALUE"]),
    ("stages.pretrain.steps=many", ["config.stages.pretrain.steps='many'", "expected int"]),
    ("stages.pretrain.steps=2.5", ["config.stages.pretrain.steps=2.5", "expected int"]),
    ("stages.pretrain.steps=-1", ["config.stages.pretrain.steps=-1", "at least 1"]),
    ("stages.pretrain={[]: 1}", ["config.stages.pretrain", "expected a section"]),
    ("stages.pretrain.kind=pretran", ["config.stages.pretrain.kind='pretran'", "'pretrain'"]),
    ("stages.pretrain.objective=casual", ["config.stages.pretrain.objective='casual'", "'causal'"]),
    ("stages.posttrain.objective=casual", ["config.stages.posttrain.objective='casual'", "'causal'"]),
    ("stages.posttrain.optimizer.name=adam", ["config.stages.posttrain", "optimizer.name='adam'", "'adamw'"]),
    ("stages.finetune.optimizer.schedule=cosin", ["config.stages.finetune", "schedule='cosin'", "'cosine'"]),
    ("stages.finetune.optimizer.warmup_steps=50", ["config.stages.finetune", "optimizer.warmup_steps=50"]),
    ("stages.finetune.optimizer.options={'b3': 1}", ["config.stages.finetune", "options.b3"]),
    ("evaluations.task.kind=clasification", ["config.evaluations.task.kind", "'classification'"]),
    ("evaluations.task.source=taks", ["config.evaluations.task.source='taks'", "'task'"]),
    ("evaluations.task.source=general", ["general", "label"]),
    ("evaluations.task.batch_size=4", ["config.evaluations.task.batch_size=4", "multiple of 8"]),
    ("stages.pretrain.data={'genral': 1.0}", ["config.stages.pretrain.data='genral'", "'general'"]),
    ("stages.pretrain.data={}", ["config.stages.pretrain.data is empty"]),
    ("stages.pretrain.data.general=-1", ["config.stages.pretrain.data.general=-1"]),
    ("stages.finetune.data={'general': 1.0}", ["general", "label"]),
    ("stages.scratch.batch_size=12", ["config.stages.scratch.batch_size=12", "multiple of 8"]),
    ("stages.scratch.micro_batches=2", ["config.stages.scratch.batch_size=8", "multiple of 16"]),
    ("mesh.data=3", ["mesh", "8 devices"]),
    ("mesh.across=data", ["config.mesh.across", "'across_hosts'"]),
    ("mesh.across_hosts=dat", ["config.mesh.across_hosts='dat'", "'data'"]),
    ("mesh.rules={'lenght': 'context'}", ["config.mesh.rules.lenght", "'length'"]),
    ("mesh.rules={'length': 'kontext'}", ["config.mesh.rules.length", "'context'"]),
    ("mesh.context=3", ["mesh", "8 devices"]),
    ("stages.pretrain.guard.window=1", ["config.stages.pretrain.guard.window=1", "at least 2"]),
    ("hang_seconds=-1", ["hang_seconds=-1", "at least 0"]),
    ("hang_limits={'sav': 9}", ["hang_limits='sav'", "did you mean 'save'"]),
    ("hang_limits={'save': -1}", ["hang_limits.save=-1", "at least 0"]),
    ("stages.finetune.start=None", ["config.stages.finetune.start", "needs a parent"]),
    ("stages.finetune.start=init", ["config.stages.finetune.start='init'", "baseline"]),
    ("stages.finetune.start={'run': 'x', 'stage': 'init'}", ["config.stages.finetune.start", "'init'"]),
    ("stages.finetune.start=5", ["config.stages.finetune.start=5"]),
    ("stages.finetune.start={'stage': 'posttrain', 'fersh': []}", ["config.stages.finetune.start.fersh", "'fresh'"]),
    ("stages.finetune.start={'stage': 'posttrain', 'fresh': 5}", ["config.stages.finetune.start.fresh=5"]),
    ("stages.finetune.start={'stage': 'posttrain', 'fresh': ['(']}", ["config.stages.finetune.start.fresh", "'('"]),
    ("stages.finetune.start={'stage': 'posttrain', 'step': 4}", ["config.stages.finetune.start.step=4", "8, 10"]),
    ("stages.pretrain.start=posttrain", ["config.stages.pretrain.start='posttrain'", "from nothing"]),
    ("stages.posttrain.start=finetune", ["config.stages: finetune, posttrain", "cycle"]),
    ("stages.posttrain.start=pretrian", ["config.stages.posttrain.start='pretrian'", "'pretrain'"]),
    ("stages.pretrain.train=head", ["config.stages.pretrain.train='head'", "'all'"]),
    ("stages.posttrain.train=embeding", ["config.stages.posttrain.train", "'embeding' matches nothing", "embeddings"]),
    ("stages.posttrain.train=[1]", ["config.stages.posttrain.train=[1]"]),
    ("stages.posttrain.train=top(9)", ["config.stages.posttrain.train", "2 layers"]),
    ("stages.finetune.best=accuracy", ["config.stages.finetune.best='accuracy'", "task"]),
    ("stages.finetune.best=task_acuracy", ["config.stages.finetune.best='task_acuracy'", "'task_accuracy'"]),
    ("stages.pretrain.best=task_accuracy", ["config.stages.pretrain.best='task_accuracy'", "no such metric"]),
    ("stages.finetune.optimizer.options={'b1': 'x'}", ["config.stages.finetune", "the train step cannot be built"]),
    ("stages.posttrain.train=lm_head/.*", ["config.stages.posttrain.train", "tied to embed/embedding"]),
    ("model.kv_heads=-1", ["model.kv_heads=-1", "at least 1"]),
    ("model.norm_epsilon=0", ["model.norm_epsilon=0", "above 0"]),
    ("model.vocab_size=99", ["config.model.vocab_size", "tokenizer"]),
    ("model.heads=3", ["model.heads=3", "d_model=16"]),
    ("model.norm=rms", ["model.norm='rms'", "'rmsnorm'"]),
    ("tokenizer.vocab_size=100", ["tokenizer.vocab_size=100", "260"]),
    ("tokenizer.path=/no/tokenizer.json", ["/no/tokenizer.json", "does not exist"]),
    ("tokenizer.sources=['genral']", ["tokenizer.sources", "'general'"]),
    ("sources.general.text=txt", ["'txt'", "'text'"]),
]


@pytest.mark.parametrize(("override", "parts"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_wrong_override_is_refused_by_name_and_leaves_no_trace(capsys, tmp_path, file, override, parts):
    error = refused(capsys, ["run", f"--config={file}", f"--workdir={tmp_path / 'run'}", f"--config.{override}"])
    for part in parts:
        assert part in error
    assert tiny.files(tmp_path) == {}


FILES = [
    ("c.stages.finetun = dict(steps=5)", ["config.stages.finetun", "missing kind, data"]),
    ("c.sede = 1", ["config.sede", "'seed'"]),
    ("c.stages = {}", ["config.stages is empty"]),
    ("del c.model", ["config: missing model"]),
    ("c.stages.init = c.stages.scratch", ["config.stages.init", "cannot be a stage's name"]),
    ("raise KeyError('wrong')", ["KeyError: 'wrong'"]),
    ("return 5", ["get_config() returned int"]),
    ("c.sources.general.data_files.train = '/no/such.jsonl'", ["/no/such.jsonl does not exist"]),
    ("c.sources.general.data_files.train = c.sources.general.data_files.train + 'x'", ["x does not exist", "train"]),
]


@pytest.mark.parametrize(("line", "parts"), FILES, ids=[line for line, _ in FILES])
def test_a_wrong_config_file_is_refused_by_name_and_leaves_no_trace(capsys, tmp_path, base, line, parts):
    file = tiny.write_config(base / "wrong.py", base, line)
    error = refused(capsys, ["run", f"--config={file}", f"--workdir={tmp_path / 'run'}"])
    for part in parts:
        assert part in error
    assert tiny.files(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "parts"), [(b"", ["is empty"]), (b'{"text": "\xff\xfe"}\n', ["not UTF-8", "row 0"])]
)
def test_a_file_without_readable_text_is_refused_by_name(capsys, tmp_path, file, content, parts):
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(content)
    override = f"--config.sources.general.data_files={{'train': '{broken}'}}"
    error = refused(capsys, ["run", f"--config={file}", f"--workdir={tmp_path / 'run'}", override])
    for part in ["broken.jsonl", *parts]:
        assert part in error


def test_a_config_file_that_is_not_there_is_refused_with_its_neighbours(capsys, base, file):
    error = refused(capsys, ["run", f"--config={base / 'confg.py'}", "--workdir=unused"])
    assert "confg.py: no such file" in error and f"did you mean '{file}'" in error


def test_a_config_file_without_get_config_is_refused(capsys, tmp_path):
    (tmp_path / "empty.py").write_text("")
    assert "defines no get_config()" in refused(
        capsys, ["run", f"--config={tmp_path / 'empty.py'}", "--workdir=unused"]
    )


def test_a_stage_on_the_command_line_that_is_not_in_the_config_is_refused(capsys, tmp_path, file):
    for verb, option in (("run", "--stages=finetun"), ("eval", "--stages=finetun"), ("bench", "--stage=finetun")):
        error = refused(capsys, [verb, f"--config={file}", f"--workdir={tmp_path / 'run'}", option])
        assert "=finetun: no such stage; did you mean 'finetune'" in error


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_matmuls_in_8_bits_without_qwix_are_refused_by_name(capsys, monkeypatch, tmp_path, file, verb):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else found(name))
    where = ["--config.model.matmul=int8", f"--workdir={tmp_path / 'run'}"]
    error = refused(capsys, [verb, f"--config={file}", *where])
    assert "config.model.matmul='int8': needs qwix, which is not installed: pip install 'llm3[qwix]'" in error
    assert tiny.files(tmp_path) == {}


def test_nearest_names_come_first_in_a_message():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        schema.one_of("schedule", "cosin", ("cosine", "linear"))


@pytest.mark.parametrize("field", ["evaluations.general.kind='perplexity'", "stages.pretrain.objective='causal'"])
def test_a_model_that_sees_the_next_token_is_not_asked_to_predict_it(capsys, tmp_path, file, field):
    encoder = ["--config.model.causal=False", "--config.model.pool=mean"]
    if field.startswith("stages"):
        encoder.append("--config.evaluations={}")
    error = refused(capsys, ["run", f"--config={file}", f"--workdir={tmp_path / 'run'}", *encoder])
    assert field in error and "bidirectional" in error


@pytest.mark.parametrize("override", ["train=embeding", "optimizer.options={'b3': 1}", "unfreeze=[[5, 'top(9)']]"])
def test_what_does_not_fit_the_model_is_refused_before_data_is_read(capsys, monkeypatch, tmp_path, file, override):
    from llm3.stages import experiment

    monkeypatch.setattr(experiment, "read_library", lambda *_: pytest.fail("data was read"))
    command = ["run", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    assert "config.stages.posttrain" in refused(capsys, [*command, f"--config.stages.posttrain.{override}"])
