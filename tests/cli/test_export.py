"""The content of exports, and rejected exports; existing files are never overwritten."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest

from llm3.__main__ import main
from llm3.cli import export as module
from llm3.cli.export import check_family, export
from llm3.data.tokenizer import SPECIALS, train
from llm3.errors import UserError
from llm3.tree import map_with_path
from tests.helpers.tiny import model_config
from tests.helpers.tiny_export import ADAPTERS, STAGE, TEXTS, model, tensors, write_run, written


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
    assert tensors(to / "head.safetensors")["weight"].shape == (3, 16)
    assert "task head of 3 classes" in capsys.readouterr().out


def test_the_command_line_writes_a_stage_and_says_what(tmp_path, capsys):
    write_run(tmp_path / "run", *model())
    to = tmp_path / "new" / "out"
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--stage={STAGE}", f"--to={to}"]) == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
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
        ({"heads": 6}, "model.heads=6"),
    ],
)
def test_what_has_no_counterpart_is_named(changes, field):
    with pytest.raises(UserError, match=field):
        check_family(model_config(**changes))


def test_qwen3_takes_heads_that_do_not_divide_the_model():
    check_family(model_config(heads=6, qk_norm=True))


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


def test_without_safetensors_the_extra_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match=r"pip install 'llm3\[hf\]'"):
        export(run, STAGE, tmp_path / "out", "merged", "latest", None)


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
    def interfere(directory, source):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("kept")

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
