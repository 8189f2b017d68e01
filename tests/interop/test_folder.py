"""Folders of others are read slice by slice, whatever their dtype, shards and spelling of names."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError
from llm3.interop import shards as shards_module
from llm3.interop.folder import open_folder
from llm3.interop.write import write_folder
from llm3.models.transformer import abstract_params
from llm3.tree import flatten, unflatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny_files import change_tensors, cut_in_two, shapes, tensors_of, write_model
from tests.helpers.tiny_world import read_params, tensors, write_again

KINDS = ("llama", "qwen3", "bert")


def opened(folder, **options):
    return open_folder(str(folder), options.get("revision"), "model")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_written_again(kind, tmp_path):
    folder = opened(write_model(kind, tmp_path / "in"))
    written = tensors(write_again(folder, tmp_path / "out"))
    expected = tensors_of(kind)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again = opened(tmp_path / "out")
    assert (again.config, again.family, again.max_length) == (folder.config, kind, 64)


def test_kernels_are_in_by_out_and_stacked(tmp_path):
    found, expected = read_params(opened(write_model("qwen3", tmp_path))), tensors_of("qwen3")
    query = found["layers"]["attention"]["query"]["kernel"]
    assert query.shape == (4, 16, 4, 8)
    np.testing.assert_array_equal(query[2, :, 3], expected["model.layers.2.self_attn.q_proj.weight"][24:].T)
    out = expected["model.layers.1.self_attn.o_proj.weight"][:, 8:16].T
    np.testing.assert_array_equal(found["layers"]["attention"]["out"]["kernel"][1, 1], out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_exactly(dtype, tmp_path):
    folder = opened(write_model("llama", tmp_path, dtype))
    assert {kind for _, kind in folder.leaves.values()} == {dtype}
    found = flatten(read_params(folder))["layers/mlp/down/kernel"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[3], tensors_of("llama", dtype)["model.layers.3.mlp.down_proj.weight"].T)


def test_several_files_are_read_as_one(tmp_path):
    whole = read_params(opened(write_model("bert", tmp_path)))
    cut_in_two(tmp_path)
    for path, leaf in flatten(read_params(opened(tmp_path))).items():
        np.testing.assert_array_equal(leaf, flatten(whole)[path], err_msg=path)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_no_slice_is_larger_than_the_part_of_a_device(kind, tmp_path, monkeypatch):
    folder = opened(write_model(kind, tmp_path))
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    asked: list[int] = []
    plain = shards_module.Shards.slices

    def slices(self, tensor):
        read = plain(self, tensor)

        def counted(index):
            piece = read(index)
            asked.append(piece.size)
            return piece

        return counted

    monkeypatch.setattr(shards_module.Shards, "slices", slices)
    whole, sharded = read_params(folder), 0
    for path, like in flatten(abstract_params(ModelConfig(**folder.config), mesh)).items():
        asked.clear()
        found = folder.read(path, like)
        np.testing.assert_array_equal(found, flatten(whole)[path], err_msg=path)
        assert found.sharding == like.sharding
        part = int(np.prod(like.sharding.shard_shape(like.shape)))
        layers = 4 if path.startswith("layers/") else 1
        assert max(asked) <= part // layers, "a slice of one layer"
        assert sum(asked) == found.size, "nothing is read twice, though `data` holds two copies"
        sharded += part < found.size
    assert sharded >= 8


def test_rows_that_pad_the_vocabulary_are_zeros_and_are_not_written(tmp_path):
    folder = opened(write_model("llama", tmp_path / "in"))
    mesh = mesh_of(8, tensor=8)
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    like = jax.ShapeDtypeStruct((56, 16), np.float32, sharding=sharding)
    found = np.asarray(folder.read("embed/embedding", like))
    np.testing.assert_array_equal(found[:48], tensors_of("llama")["model.embed_tokens.weight"])
    assert not found[48:].any()
    model = ModelConfig(**folder.config, vocab_multiple=56)
    params = {path: folder.read(path, each) for path, each in flatten(abstract_params(model, mesh_of(1))).items()}
    write_folder(tmp_path, unflatten(params), model)
    written = tensors(tmp_path)
    assert {name: each.shape for name, each in written.items()} == shapes("llama")
    np.testing.assert_array_equal(written["lm_head.weight"], tensors_of("llama")["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_any_head_lacks_the_prefix_of_its_names(kind, tmp_path):
    base = {"bert": "bert."}.get(kind, "model.")
    folder = write_model(kind, tmp_path, architectures=["Model"])
    change_tensors(folder, lambda t: {n.removeprefix(base): v for n, v in t.items() if n.startswith(base)})
    leaves = opened(folder).leaves
    assert "embed/embedding" in leaves
    assert not any(path.startswith(("lm_head/", "lm_transform/")) for path in leaves)


def test_old_names_buffers_and_other_heads_are_known(tmp_path):
    more = {
        "bert.embeddings.position_ids": np.arange(64)[None],
        "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
        "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
        "bert.pooler.dense.bias": np.ones(16, np.float32),
    }
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(tensors):
        for new, name in renamed.items():
            tensors = {each.replace(new, name): value for each, value in tensors.items()}
        return tensors | more

    folder = opened(change_tensors(write_model("bert", tmp_path), old))
    assert folder.ignored == ("bert.embeddings.position_ids", "cls.seq_relationship.weight")
    assert folder.config["pooler"] is True and folder.leaves["pooler/kernel"][0] == (16, 16)
    assert folder.config["pool"] == "first" and folder.labels == ()


def test_a_copy_of_a_tied_head_is_ignored_and_another_head_is_not(tmp_path):
    embedding = tensors_of("qwen3")["model.embed_tokens.weight"]
    folder = change_tensors(write_model("qwen3", tmp_path), lambda t: t | {"lm_head.weight": embedding})
    assert opened(folder).ignored == ("lm_head.weight",)
    change_tensors(folder, lambda t: t | {"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"unknown: lm_head\.weight"):
        opened(folder)


def test_the_digest_is_that_of_all_files_that_are_read(tmp_path):
    folder = write_model("llama", tmp_path)
    first = opened(folder).digest
    assert opened(folder).digest == first
    (folder / "notes.txt").write_text("no part of the model")
    assert opened(folder).digest == first
    (folder / "tokenizer.json").write_text("{}")
    second = opened(folder).digest
    change_tensors(folder, lambda t: {name: value + 1 for name, value in t.items()})
    assert len({first, second, opened(folder).digest}) == 3
