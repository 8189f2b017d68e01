"""Exports of models that began as somebody else's: the family's layout, the tokenizer's files, the head's place."""

import json

import pytest
import tokenizers

from llm3.cli.export import export
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.interop.folder import open_folder
from tests.helpers import tiny_foreign
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_export import STAGE, write_run
from tests.helpers.tiny_world import tensors

BERT = {
    "causal": False,
    "block": "post",
    "norm": "layernorm",
    "norm_epsilon": 1e-12,
    "final_norm": False,
    "activation": "gelu",
    "gated_mlp": False,
    "attention_bias": "all",
    "mlp_bias": True,
    "positions": "learned",
    "max_positions": 32,
    "token_types": 2,
    "embedding_norm": True,
    "lm_transform": True,
    "lm_head_bias": True,
    "pool": "first",
    "pooler": True,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 4,
}
QWEN2 = {"attention_bias": "qkv"}


def exported(folder, text: str, family: str, *, added=(), labels=(), template=None, form="merged", fresh=(), **changes):
    """The directory that a run of this family with somebody else's tokenizer is exported to."""
    tokenizer = Tokenizer.load(getattr(tiny_foreign, text)(folder / "tokenizer")).extended(added)
    model = model_config(vocab_size=tokenizer.vocab_size + 5, **changes, classes=len(labels))
    template = tokenizer.chat_template if template is None else template
    meta = {"model_family": family, "model_max_length": 4096}
    write_run(folder / "run", model, make_params(model), labels, template=template, text=tokenizer, **meta)
    assert export(folder / "run", STAGE, folder / "out", form, "latest", None) == 0
    return folder / "out", tokenizer


def described(to, name: str = "config.json") -> dict:
    return json.loads((to / name).read_text())


def test_the_files_of_a_tokenizer_are_written_as_they_came_with_what_was_added(tmp_path):
    to, tokenizer = exported(tmp_path, "qwen", "qwen2", added=["aspirin"], **QWEN2)
    came = described(tmp_path / "tokenizer", "tokenizer.json")
    written = described(to, "tokenizer.json")
    added = written["added_tokens"].pop()
    assert (added["content"], added["id"]) == ("aspirin", tokenizer.vocab_size - 1)
    assert written == came
    assert described(to, "tokenizer_config.json") == described(tmp_path / "tokenizer", "tokenizer_config.json")
    again = Tokenizer.load(to)
    assert (again.chat_template, again.end_ids) == (tokenizer.chat_template, tokenizer.end_ids)
    assert again.encode("two aspirin") == tokenizer.encode("two aspirin")


def test_config_and_generation_config_have_the_ids_of_the_tokenizer(tmp_path):
    to, tokenizer = exported(tmp_path, "qwen", "qwen2", **QWEN2)
    ends = sorted(tokenizer.end_ids)
    assert len(ends) == 2 and tokenizer.bos_id is None
    for name in ("config.json", "generation_config.json"):
        found = described(to, name)
        assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (None, ends, tokenizer.pad_id)
    assert described(to)["model_type"] == "qwen2"
    assert described(to)["max_position_embeddings"] == 4096
    assert described(to)["vocab_size"] == tokenizer.vocab_size + 5


def test_another_template_of_the_run_replaces_the_one_that_came(tmp_path):
    own = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    to, _ = exported(tmp_path, "qwen", "qwen2", template=own, **QWEN2)
    assert (to / "chat_template.jinja").read_text() == own
    assert "chat_template" not in described(to, "tokenizer_config.json")


def test_a_classifier_of_bert_has_pooler_and_classifier_in_their_place(tmp_path, capsys):
    to, tokenizer = exported(tmp_path, "bert", "bert", labels=("no", "yes"), **BERT)
    found = tensors(to)
    assert described(to)["architectures"] == ["BertForSequenceClassification"]
    assert described(to)["id2label"] == {"0": "no", "1": "yes"}
    assert found["classifier.weight"].shape == (2, 16) and found["bert.pooler.dense.weight"].shape == (16, 16)
    assert not any(name.startswith("cls.") for name in found)
    assert not (to / "head.safetensors").exists()
    printed = capsys.readouterr().out
    assert "lm_head and lm_transform: left out, BertForSequenceClassification has no LM head" in printed
    folder = open_folder(str(to), None, "model")
    assert folder.labels == ("no", "yes") and folder.config["pooler"] is True
    ids, backend = tokenizer.encode("the fox"), tokenizers.Tokenizer.from_file(str(to / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    assert backend.encode("the fox").ids == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    pair = backend.encode("the fox", "the fox")
    assert pair.ids == [tokenizer.bos_id, *ids, tokenizer.eos_id, *ids, tokenizer.eos_id]
    assert set(pair.type_ids) == {0}, "as llm3 trains it"


@pytest.mark.parametrize("changes", [{"pool": "mean"}, {"pooler": False}])
def test_a_head_that_bert_has_no_place_for_is_a_file_of_its_own(changes, tmp_path, capsys):
    to, _ = exported(tmp_path, "bert", "bert", labels=("no", "yes"), **BERT | changes)
    assert described(to)["architectures"] == ["BertForMaskedLM"]
    assert not any(name.startswith(("classifier", "bert.pooler")) for name in tensors(to))
    assert "with no place in transformers" in capsys.readouterr().out
    assert (to / "head.safetensors").is_file()


def test_a_classifier_pads_with_a_token_that_ends_no_text(tmp_path, capsys):
    to, tokenizer = exported(tmp_path, "llama3", "llama", labels=("no", "yes"))
    assert tokenizer.pad_id in tokenizer.end_ids, "as in SmolLM2 and Llama 3"
    pad = described(to)["pad_token_id"]
    assert pad not in (*tokenizer.end_ids, tokenizer.bos_id)
    assert described(to, "tokenizer_config.json")["pad_token"] == tokenizer.tokens[pad]
    assert f"padding is {tokenizer.tokens[pad]}" in capsys.readouterr().out


def test_a_model_that_left_its_family_is_refused_by_the_field(tmp_path):
    with pytest.raises(UserError, match=r"model\.qk_norm='head' has no counterpart in transformers' qwen2"):
        exported(tmp_path, "qwen", "qwen2", qk_norm="head", **QWEN2)
    assert not (tmp_path / "out").exists()


def test_float16_refuses_values_that_it_cannot_hold(tmp_path):
    model = model_config(vocab_size=270)
    params = make_params(model)
    params["final_norm"]["scale"][3] = 1e5
    tokenizer = Tokenizer.load(tiny_foreign.qwen(tmp_path / "tokenizer"))
    write_run(tmp_path / "run", model, params, text=tokenizer)
    with pytest.raises(UserError, match=r"--dtype=float16: final_norm/scale has values up to 1e\+05"):
        export(tmp_path / "run", STAGE, tmp_path / "out", "merged", "latest", None, "float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["5", "GB", "5gb", "-1GB"])
def test_a_size_of_shards_is_a_number_and_a_unit(size, tmp_path):
    with pytest.raises(UserError, match=f"--max_shard_size={size}: expected a number and KB, MB, GB or TB"):
        export(tmp_path, STAGE, tmp_path / "out", "merged", "latest", None, "float32", size)


def test_a_push_is_checked_first_and_uploads_what_was_written(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("llm3.cli.export.check_push", lambda name: calls.append(("check", name)))

    def push(folder, name, message):
        calls.append(("push", name, message, sorted(each.name for each in folder.iterdir())))
        return "https://hub/me/tiny"

    monkeypatch.setattr("llm3.cli.export.push_folder", push)
    model = model_config(vocab_size=270)
    write_run(tmp_path / "run", model, make_params(model))
    export(tmp_path / "run", STAGE, tmp_path / "out", "merged", "latest", None, push="me/tiny")
    assert calls[0] == ("check", "me/tiny")
    assert calls[1][:2] == ("push", "me/tiny") and "adapt step 7, written by llm3" in calls[1][2]
    assert "model.safetensors" in calls[1][3]
    assert "uploaded to https://hub/me/tiny" in capsys.readouterr().out
