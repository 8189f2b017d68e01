"""Models of each family are written as transformers would write them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from llm3.interop.folder import open_folder
from tests.helpers.tiny_hf import FAMILIES, logits, make, saved, tiny, torch, transformers
from tests.helpers.tiny_world import tensors, write_again


def written(source, to, *more, **options):
    """What llm3 writes of the model in a folder."""
    return write_again(open_folder(str(source), None, "model"), to, *more, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_equal_leaf_by_leaf_and_load_in_transformers(name, tmp_path):
    source = saved(name, tmp_path / "source")
    to = written(source, tmp_path / "to", max_shard_size="50KB")
    theirs, ours = tensors(source), tensors(to)
    assert ours.keys() == theirs.keys()
    for each, value in theirs.items():
        np.testing.assert_array_equal(ours[each], value, err_msg=each)
    auto = transformers.AutoModelForMaskedLM if "bert" in name else transformers.AutoModelForCausalLM
    found, info = auto.from_pretrained(to, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    text = np.arange(3, 27)
    np.testing.assert_allclose(logits(found.eval(), text), logits(tiny(name), text), atol=1e-5)
    for key, value in found.config.to_dict().items():
        if key in ("max_position_embeddings", "n_positions", "rms_norm_eps", "layer_types", "rope_parameters"):
            assert tiny(name).config.to_dict()[key] == value, key


def test_shards_have_an_index_and_none_is_larger_than_asked(tmp_path):
    to = written(saved("llama", tmp_path / "source", "1GB"), tmp_path / "to", max_shard_size="100KB")
    index = json.loads((to / "model.safetensors.index.json").read_text())
    files = sorted(to.glob("*.safetensors"))
    assert len(files) > 2 and {each.name for each in files} == set(index["weight_map"].values())
    assert all(sum(each.nbytes for each in load_file(file).values()) <= 100_000 for file in files)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors(to).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_and_written_without_a_change(dtype, tmp_path):
    model = make("Llama", "LlamaForCausalLM", {}).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    to = written(tmp_path / "source", tmp_path / "to", dtype)
    theirs, ours = tensors(tmp_path / "source"), tensors(to)
    for name, value in theirs.items():
        assert ours[name].dtype.name == dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype
