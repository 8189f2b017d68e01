"""The content of exports, and rejected exports; existing files are never overwritten."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from llm3.__main__ import main
from llm3.cli import export as module
from llm3.cli.export import export
from llm3.data.tokenizer import SPECIALS, train
from llm3.errors import UserError
from llm3.interop.family import family_of_model
from llm3.tree import map_with_path
from tests.helpers.tiny import model_config
from tests.helpers.tiny_export import (
    ADAPTERS,
    ADDED,
    SPELLED,
    STAGE,
    TEXTS,
    model,
    tensors,
    tokenizer,
    write_run,
    written,
)


def files(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_float32_out_by_in_and_a_tied_head_is_left_out(tied, tmp_path):
    to = written(tmp_path, tie_embeddings=tied)
    config, params = model(tie_embeddings=tied)
    found = tensors(to / "model.safetensors")
    assert {value.dtype.name for value in found.values()} == {"float32"}
    assert ("lm_head.weight" in found) is not tied
    assert len(found) == 2 + 9 * config.layers + (not tied)
    assert json.loads((to / "config.json").read_text())["tie_word_embeddings"] is tied
    attention = params["layers"]["attention"]
    for head in range(config.heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        query, out = (found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q", "o"))
        np.testing.assert_array_equal(query[rows], attention["query"]["kernel"][1, :, head].T)
        np.testing.assert_array_equal(out[:, rows], attention["out"]["kernel"][1, head].T)


def test_only_active_adapters_are_merged_and_the_others_are_named(tmp_path, capsys):
    pair = (("medical", ADAPTERS["lora"]), ("legal", dataclasses.replace(ADAPTERS["lora"], active=False)))
    _, params = model(adapters=pair)
    found = tensors(written(tmp_path, adapters=pair) / "model.safetensors")
    up = params["layers"]["mlp"]["up"]
    delta = 6 / 2 * up["lora"]["medical"]["a"][2].astype(np.float64) @ up["lora"]["medical"]["b"][2]
    np.testing.assert_allclose(found["model.layers.2.mlp.up_proj.weight"], (up["kernel"][2] + delta).T, atol=1e-5)
    printed = capsys.readouterr().out
    assert "adapter medical of rank 2: merged" in printed
    assert "adapter legal of rank 2: omitted, it is inactive" in printed
    base = tensors(written(tmp_path, "base", name="base") / "model.safetensors")
    np.testing.assert_array_equal(base["model.layers.2.mlp.up_proj.weight"], up["kernel"][2].T)
    adapters = written(tmp_path, "adapters", name="adapters")
    assert {each.name for each in adapters.iterdir()} == {"legal", "medical"}


def test_the_head_comes_with_adapters_as_well(tmp_path, capsys):
    adapters = (("medical", ADAPTERS["lora"]),)
    to = written(tmp_path, "adapters", labels=("a", "b", "c"), classes=3, adapters=adapters)
    weight = tensors(to / "head.safetensors")["weight"]
    assert weight.shape == (3, 16)
    found = tensors(to / "medical" / "adapter_model.safetensors")["base_model.model.score.weight"]
    np.testing.assert_array_equal(found, weight)
    config = json.loads((to / "medical" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "task head of 3 classes" in capsys.readouterr().out


def described(to) -> dict:
    return json.loads((to / "config.json").read_text())


def test_a_head_at_the_last_token_lies_where_transformers_reads_it(tmp_path, capsys):
    to = written(tmp_path, labels=("a", "b", "c"), classes=3, run={"label_sets": True})
    found, (_, params) = tensors(to / "model.safetensors"), model(classes=3)
    np.testing.assert_array_equal(found["score.weight"], params["head"]["kernel"].T)
    np.testing.assert_array_equal(found["score.bias"], params["head"]["bias"])
    assert described(to)["architectures"] == ["LlamaForSequenceClassification"]
    assert described(to)["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert described(to)["problem_type"] == "multi_label_classification"
    assert not (to / "head.safetensors").exists()
    printed = capsys.readouterr().out
    assert (
        "score.bias: up to " in printed and "train=['not head/bias', ...]" in printed and "appends <|eos|>" in printed
    )


def test_a_head_without_a_bias_is_complete_in_transformers(tmp_path, capsys):
    config, params = model(classes=3)
    params = params | {"head": params["head"] | {"bias": np.zeros(3, np.float32)}}
    write_run(tmp_path / "run", config, params, ("a", "b", "c"))
    assert "score.bias" not in tensors(written(tmp_path) / "model.safetensors")
    assert "score.bias" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "objective", "hidden"),
    [({"pool": "mean"}, "classify", "averaged over all tokens"), ({"classes": 2}, {"name": "span"}, "of each token")],
)
def test_a_head_that_transformers_has_no_place_for_has_no_labels_there(tmp_path, capsys, changes, objective, hidden):
    to = written(tmp_path, labels=("a", "b", "c"), run={"objective": objective}, **{"classes": 3, **changes})
    assert "id2label" not in described(to) and described(to)["architectures"] == ["LlamaForCausalLM"]
    assert not any(name.startswith("score") for name in tensors(to / "model.safetensors"))
    assert (to / "head.safetensors").is_file()
    assert hidden in capsys.readouterr().out


def test_a_chat_template_is_exported_with_every_token_that_ends_a_turn(tmp_path):
    to, end = written(tmp_path, run={"template": ADDED}), tokenizer().encode("数学")
    assert len(end) == 1
    assert (to / "chat_template.jinja").read_text() == "{{ bos_token }}" + ADDED
    for name in ("config.json", "generation_config.json"):
        found = json.loads((to / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (1, [2, *end], 0)
    assert json.loads((to / "tokenizer_config.json").read_text())["split_special_tokens"] is False
    added = json.loads((to / "tokenizer.json").read_text())["added_tokens"]
    assert {each["id"] for each in added if each["special"]} == {0, 1, 2, 3, *end}


def test_an_end_of_turn_of_several_tokens_is_named(tmp_path, capsys):
    to = written(tmp_path, run={"template": SPELLED})
    assert json.loads((to / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "stop_strings=['<|im_end|>']" in capsys.readouterr().out


def test_a_lost_or_changed_chat_template_is_named(tmp_path):
    written(tmp_path, run={"template": ADDED})
    kept = tmp_path / "run" / "chat_template.jinja"
    kept.write_text(SPELLED)
    with pytest.raises(UserError, match=r"chat_template\.jinja is not the chat template that adapt was trained with"):
        written(tmp_path, name="changed")
    kept.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read"):
        written(tmp_path, name="damaged")
    kept.unlink()
    with pytest.raises(UserError, match=r"chat_template\.jinja is missing"):
        written(tmp_path, name="lost")


def test_tensors_are_rounded_to_the_dtype_once(tmp_path, capsys):
    whole, half = written(tmp_path, name="whole"), written(tmp_path, name="half", dtype="bfloat16")
    found, expected = tensors(half / "model.safetensors"), tensors(whole / "model.safetensors")
    for name, value in expected.items():
        assert found[name].dtype.name == "bfloat16"
        np.testing.assert_array_equal(found[name], value.astype(jnp.bfloat16), err_msg=name)
    assert described(half)["dtype"] == "bfloat16" and described(whole)["dtype"] == "float32"
    count = sum(value.size for value in expected.values())
    assert f"{2 * count:,} bytes, bfloat16" in capsys.readouterr().out
    with pytest.raises(UserError, match="--dtype=bfloat: did you mean 'bfloat16'"):
        written(tmp_path, name="none", dtype="bfloat")


def test_the_command_line_writes_a_stage_and_says_what(tmp_path, capsys):
    write_run(tmp_path / "run", *model())
    to = tmp_path / "new" / "out"
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--stage={STAGE}", f"--to={to}"]) == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files(to).keys() == names
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in to.iterdir()} == {0o666 & ~umask}, "by umask, not 0600"
    printed = capsys.readouterr().out
    count = sum(value.size for value in tensors(to / "model.safetensors").values())
    for each in ("step 7", "LlamaForCausalLM, 29 tensors", f"{count:,} parameters, {4 * count:,} bytes", SPECIALS[1]):
        assert each in printed


def test_a_step_is_the_latest_or_the_one_that_is_named(tmp_path):
    (config, first), (_, second) = model(), model(tie_embeddings=True, rope_theta=10_000.0)
    second = map_with_path(lambda _, leaf: leaf + 1, second)
    write_run(tmp_path / "run", config, first, step=3)
    write_run(tmp_path / "run", config, second, step=20)
    for step, params in (("latest", second), ("20", second), ("3", first)):
        found = tensors(written(tmp_path, name=step, step=step) / "model.safetensors")
        np.testing.assert_array_equal(found["model.norm.weight"], params["final_norm"]["scale"])
    for step, says in (("4", "3, 20"), ("last", "'latest'")):
        with pytest.raises(UserError, match=says):
            written(tmp_path, name="none", step=step)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"norm": "layernorm"}, "model.norm='layernorm'"),
        ({"causal": False, "pool": "mean"}, "model.causal=False"),
        ({"logit_softcap": 30.0}, "model.logit_softcap=30.0"),
    ],
)
def test_what_has_no_counterpart_is_named(changes, field):
    with pytest.raises(UserError, match=field):
        family_of_model(model_config(**changes))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "head", "heads": 6}, "qwen3"),
        ({"heads": 6}, "mistral"),  # transformers' Llama rejects heads that do not divide the model
        ({"window": 8}, "mistral"),
        ({"attention_bias": "qkv"}, "qwen2"),
    ],
)
def test_a_model_of_our_own_takes_the_first_family_that_expresses_it(changes, family):
    assert family_of_model(model_config(**changes)) == family


def test_a_refused_model_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="logit_softcap"):
        written(tmp_path, logit_softcap=30.0)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run without adapters."""
    directory = tmp_path_factory.mktemp("export") / "run"
    write_run(directory, *model())
    return directory


@pytest.mark.parametrize(
    ("form", "base", "says"),
    [
        ("merge", None, "did you mean 'merged'"),
        ("adapters", None, "has no adapters"),
        ("merged", "somewhere", "only --format=adapters"),
    ],
)
def test_formats_that_do_not_apply_are_refused(run, form, base, says, tmp_path):
    with pytest.raises(UserError, match=says):
        export(run, STAGE, tmp_path / "out", form, "latest", base)
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_names_the_nearest(run, tmp_path):
    with pytest.raises(UserError, match="did you mean 'adapt'"):
        export(run, "adpt", tmp_path / "out", "merged", "latest", None)


def test_another_tokenizer_is_refused(tmp_path):
    write_run(tmp_path / "run", *model())
    train(TEXTS, 265).save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(UserError, match="not the tokenizer"):
        written(tmp_path)


def test_nothing_that_exists_is_overwritten(run, tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir(), empty.mkdir(), file.write_text("kept"), (full / "config.json").write_text("kept")
    for to in (full, file):
        with pytest.raises(UserError, match="exists"):
            export(run, STAGE, to, "merged", "latest", None)
    assert files(tmp_path) == {"full/config.json": b"kept", "file": b"kept"}
    assert export(run, STAGE, empty, "merged", "latest", None) == 0
    assert (empty / "model.safetensors").is_file()


def test_what_came_to_be_meanwhile_is_not_overwritten(run, monkeypatch, tmp_path):
    def interfere(*_):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("kept")
        return []

    monkeypatch.setattr(module, "write_tokenizer", interfere)
    with pytest.raises(UserError, match="cannot be written"):
        export(run, STAGE, tmp_path / "out", "merged", "latest", None)
    assert files(tmp_path) == {"out/config.json": b"kept"}


def test_a_failed_export_leaves_no_trace(run, monkeypatch, tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        export(run, STAGE, tmp_path / "out", "merged", "latest", None)
    assert not list(tmp_path.iterdir())
