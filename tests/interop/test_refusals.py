"""A model that cannot be read as it is, is refused in one line that names what is wrong; nothing is guessed."""

import json

import numpy as np
import pytest

from llm3.errors import UserError
from llm3.interop.family import REASONS, model_types
from llm3.interop.folder import open_folder
from tests.helpers.tiny_files import SHARDS, change_tensors, cut_in_two, write_index, write_model

FIELD = "config.stages.posttrain.start.model"


def assert_refused(folder, *says: str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(str(folder), revision, FIELD)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{FIELD}={str(folder)!r}: ")
    for each in says:
        assert each in message, message
    return message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_way_to_convert_it(name, tmp_path):
    folder = write_model("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_refused(folder, name, "pickle", "save_pretrained")


def test_a_missing_shard_is_named(tmp_path):
    cut_in_two(write_model("llama", tmp_path))
    (tmp_path / SHARDS[1]).unlink()
    assert_refused(tmp_path, "1 of 2 files are missing", SHARDS[1])


def test_a_truncated_file_is_named(tmp_path):
    file = write_model("llama", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(tmp_path, "model.safetensors is not a complete safetensors file")
    file.write_bytes(b"")
    assert_refused(tmp_path, "model.safetensors is not a complete safetensors file")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    file = write_model("llama", tmp_path) / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert_refused(tmp_path, "git lfs pull")


@pytest.mark.parametrize("name", ["../other.safetensors", "sub/other.safetensors", "/etc/passwd", "..", "weights.bin"])
def test_an_index_that_leaves_the_folder_is_refused(name, tmp_path):
    where = cut_in_two(write_model("llama", tmp_path / "in"))
    write_index(tmp_path / "in", where | {"model.norm.weight": name})
    assert_refused(tmp_path / "in", repr(name), "in the same folder")


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    where = cut_in_two(write_model("llama", tmp_path))
    write_index(tmp_path, where | {"model.extra.weight": SHARDS[0]})
    assert_refused(tmp_path, "not in their file: model.extra.weight")
    write_index(tmp_path, {name: file for name, file in where.items() if name != "model.norm.weight"})
    assert_refused(tmp_path, "does not name tensors that its files hold: model.norm.weight")


def test_a_damaged_config_and_index_are_named(tmp_path):
    folder = write_model("llama", tmp_path)
    for text, says in (("{", "cannot be read"), ("[]", "expected an object"), ("{}", "no 'model_type'")):
        (folder / "config.json").write_text(text)
        assert_refused(folder, says)
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json does not exist")


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    folder = write_model("llama", tmp_path, model_type="qwen")
    assert_refused(folder, "model_type 'qwen'", "did you mean", *model_types())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_5", "linear attention"),
        ("gemma4", "for each layer"),
        ("gpt_oss", "sinks"),
        ("ministral3", "yarn"),
        ("mixtral", "mixture of experts"),
        ("gemma3", "gemma3_text"),
        ("t5", "an encoder and a decoder"),
    ],
)
def test_a_family_that_is_no_llama_with_options_is_refused_with_the_reason(kind, reason, tmp_path):
    assert_refused(write_model("llama", tmp_path, model_type=kind), repr(kind), reason, "valid: bert, ")


def test_reasons_are_for_families_that_cannot_be_read():
    assert not REASONS.keys() & model_types().keys()


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "proportional"])
def test_another_scaling_of_rotary_positions_is_refused(kind, tmp_path):
    old = write_model("llama", tmp_path / "old", rope_scaling={"type": kind, "factor": 4.0})
    new = write_model("llama", tmp_path / "new", rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 4.0})
    for folder in (old, new):
        assert_refused(folder, f"rope_type '{kind}'", "linear, llama3")


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("llama", {"num_attention_heads": 0}, "a value that cannot be"),
        ("llama", {"hidden_size": "wide"}, "a value that cannot be"),
        ("llama", {"rope_parameters": ["default"]}, "a value that cannot be"),
        ("llama", {"num_attention_heads": 3}, "model.heads=3"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
    ],
)
def test_an_option_that_llm3_does_not_compute_is_named(kind, changes, says, tmp_path):
    assert_refused(write_model(kind, tmp_path, **changes), says)


def test_all_leaves_too_many_too_few_and_of_another_shape_are_listed(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 16), np.float32)
        return tensors | {"model.layers.4.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}

    assert_refused(
        change_tensors(write_model("llama", tmp_path), change),
        "missing: model.norm.weight, model.layers.2.mlp.up_proj.weight",
        "unknown: model.layers.4.mlp.up_proj.weight",
        "of another shape: model.layers.0.self_attn.q_proj.weight [8, 16] (expected [16, 16])",
    )


def test_a_leaf_that_is_there_twice_is_refused(tmp_path):
    folder = write_model("llama", tmp_path)
    change_tensors(folder, lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]})
    assert_refused(folder, "twice: ")


def test_a_part_of_a_head_is_not_a_head(tmp_path):
    folder = write_model("bert", tmp_path)
    change_tensors(folder, lambda t: {name: value for name, value in t.items() if not name.endswith("dense.bias")})
    assert_refused(folder, "missing: ", "cls.predictions.transform.dense.bias")


def test_integers_are_no_weights(tmp_path):
    folder = write_model("llama", tmp_path)
    change_tensors(folder, lambda tensors: tensors | {"model.norm.weight": np.zeros(16, np.int8)})
    assert_refused(folder, "dtype I8: model.norm.weight", "F32")


def test_an_adapter_is_no_model(tmp_path):
    write_model("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert_refused(tmp_path, "neither model.safetensors nor", "found adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert_refused(tmp_path, "PEFT adapter", "merge")


def test_a_folder_has_no_revision(tmp_path):
    assert_refused(write_model("llama", tmp_path), "revision='v1'", "has no revisions", revision="v1")


@pytest.mark.parametrize("name", ["./nowhere", "runs/a/b/c", "no such model", "~/nowhere"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(name):
    assert_refused(name, "neither a folder nor a name of a model")
