"""What is wrong with a command line or a field is said in one line, with the right place or name."""

import re

import pytest

from llm3.__main__ import main
from llm3.cli.arguments import check_words, read_arguments
from llm3.cli.verbs import VERBS
from llm3.config.load import load
from llm3.errors import HINTS, SYNONYMS, UserError, closest
from llm3.stages import rules
from tests.helpers import tiny_run as tiny


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected a verb: init, run"),
        ("rn --config=a", "no such verb 'rn': did you mean 'run'"),
        ("run --topology=h100x8", "--topology: no such flag of run; plan has it"),
        ("run --workdr=x", "--workdr: no such flag of run; did you mean '--workdir'"),
        ("run --output-dir=x", "did you mean '--workdir'"),
        ("run --config=a", "run: the following arguments are required: --workdir; see python -m llm3 run --help"),
        ("bench-model --gigabytes=x", "bench-model: argument --gigabytes: invalid float value: 'x'"),
        ("export --workdir=a --to=b --stages=c,d", "--stage=c,d: expected one stage"),
        ("generate --workdir=a --prompt x --json", "--json: no such flag of generate; eval, bench have it"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(capsys, line, message):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [name for name, verb in VERBS.items() if {"--stage", "--stages"} & {f for f, _ in verb.flags}]
)
def test_stage_and_stages_are_the_same_flag(verb):
    required = [f"{flag}=x" for flag, options in VERBS[verb].flags if options.get("required") and "stage" not in flag]
    one, several = (read_arguments([verb, *required, f"--{flag}=a"])[1] for flag in ("stage", "stages"))
    assert (one == several and one.get("stage") == "a") or one.get("stages") == ["a"]


def test_values_that_look_like_flags_are_left_alone():
    check_words(["generate", "--workdir=a", "--prompt=--x", "-1"])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("config")
    return str(tiny.write_config(base / "config.py", base))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrain.lr=1", "config.stages.pretrain.lr: no such field; did you mean 'optimizer.learning_rate'"),
        ("stages.pretrain.learning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("stages.pretrain.optimizer.lr=1", "did you mean 'learning_rate'"),
        ("stages.pretrain.bs=1", "did you mean 'batch_size'"),
        ("stages.pretrain.seq_len=1", "did you mean 'sequence_length'"),
        ("model.seq_len=1", "did you mean config.stages.NAME.sequence_length"),
        ("stages.pretrain.vocab_size=1", r"did you mean config.tokenizer.vocab_size\?"),
        ("lr=1", r"config.lr: no such field; did you mean config.stages.NAME.optimizer.learning_rate"),
        ("stages.pretrain.epochs=3", "no such field; give steps: `python -m llm3 data` prints how many epochs"),
        ("stages.pretrain.objective=clm", "did you mean 'causal'"),
        ("stages.pretrain.objective=mlm", "did you mean 'masked'"),
        ("evaluations.general.kind=ppl", "did you mean 'perplexity'"),
        ("stages.pretrain.data={'genral': 1}", r"config.stages.pretrain.data='genral': did you mean 'general'"),
    ],
)  # fmt: skip
def test_a_field_of_another_library_or_another_place_is_found(config, override, message):
    with pytest.raises(UserError, match=message):
        rules.check(load(config, [override, "stages.finetune.replay=0.1", "stages.posttrain.replay=0.1"]))


def test_synonyms_are_of_names_that_are_meant_and_never_of_a_right_one():
    for name in SYNONYMS.keys() | HINTS.keys():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert closest("lr", ["rank", "seed"]) == "", "without the field that is meant"
