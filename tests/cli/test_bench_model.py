"""The bench of pretrained models counts bytes rightly, leaves nothing behind, and does not touch the model."""

import hashlib
import json
import mmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm3.cli import bench_model
from llm3.distributed.host_memory import Peak, anonymous_bytes, peak_of
from llm3.errors import UserError
from llm3.interop import folder as folder_module
from llm3.interop.folder import open_folder
from llm3.tree import flatten
from tests.helpers.tiny_files import shapes, write_model
from tests.helpers.tiny_world import read_params

# of the smallest generated model: one layer of width 128, two heads of 64 with one of keys and values, 2048 tokens
VOCABULARY, KERNELS, NORMS = 2 * 2048 * 128, 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512, 3 * 128


def test_a_generated_model_is_measured_and_removed(tmp_path, capsys):
    assert bench_model.bench_model(tmp_path, gigabytes=1e-3) == 0
    metrics = json.loads(capsys.readouterr().out)
    parameters = VOCABULARY + KERNELS + NORMS
    assert metrics["array_bytes"] == 4 * parameters
    assert metrics["largest_part_bytes"] == 4 * 2048 * 128
    assert 2 * parameters < metrics["file_bytes"] < 2.02 * parameters
    assert 4 * parameters < metrics["written_bytes"] < 4.02 * parameters
    assert metrics["read_seconds"] > 0 < metrics["write_seconds"]
    assert not list(tmp_path.iterdir())


def test_a_generated_model_is_a_llama_of_about_the_size_in_several_files_of_bfloat16(tmp_path):
    folder = open_folder(str(bench_model.generate(tmp_path / "model", 20_000_000)), None, "model")
    sizes = [path.stat().st_size for path in folder.path.glob("*.safetensors")]
    assert folder.family == "llama" and folder.model.layers > 1
    assert len(sizes) >= 4 and 15_000_000 < sum(sizes) < 25_000_000
    assert {dtype for _, dtype in folder.leaves.values()} == {"bfloat16"}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_model_is_read_by_shards_in_the_dtype_and_stays_as_it_was(dtype, size, tmp_path, monkeypatch):
    model, kept = write_model("qwen3", tmp_path / "model"), []
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
    monkeypatch.setattr(bench_model.shutil, "rmtree", lambda directory, **_: kept.append(directory))
    metrics = bench_model.measure_model(tmp_path / "work", str(model), fsdp=2, dtype=dtype)
    assert (metrics["family"], metrics["devices"], metrics["dtype"]) == ("qwen3", 2, dtype)
    assert metrics["file_bytes"] == (model / "model.safetensors").stat().st_size
    once = sum(int(np.prod(shape)) for shape in shapes("qwen3").values())
    assert metrics["array_bytes"] == size * (once + 4 * 2 * 8), "the norms of heads are whole on both devices"
    assert metrics["largest_part_bytes"] == size * 4 * 16 * 32 // 2, "four layers of 16 x 32, cut in two"
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
    written = load_file(kept[0] / "written" / "model.safetensors")
    for name, tensor in load_file(model / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], tensor.astype(jnp.dtype(dtype)), err_msg=name)


def test_the_host_holds_one_part_of_a_leaf_and_little_more(tmp_path):
    model = bench_model.generate(tmp_path / "model", 40_000_000)
    for fsdp in (1, 4):
        metrics = bench_model.measure_model(tmp_path / "work", str(model), fsdp=fsdp)
        assert metrics["read_allocated_bytes"] > metrics["largest_part_bytes"] > 1e6
        assert metrics["read_allocated_bytes"] < 1.2 * metrics["largest_part_bytes"] + 1e6


def test_leaves_read_in_blocks_are_those_read_at_once(tmp_path, monkeypatch):
    folder = open_folder(str(write_model("llama", tmp_path)), None, "model")
    whole = flatten(read_params(folder))
    monkeypatch.setattr(folder_module, "BLOCK", 40)  # cuts no leaf evenly
    for path, leaf in flatten(read_params(folder)).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        bench_model.measure_model(tmp_path, gigabytes=1e-3, fsdp=len(jax.devices()) + 1)
    with pytest.raises(UserError, match="--model="):
        bench_model.measure_model(tmp_path, str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_the_peak_is_the_most_that_was_seen_also_at_the_end():
    values = iter([5, 9, 7, *[6] * 10**6])
    with peak_of(lambda: next(values), seconds=0.001) as found:
        while next(values) != 6:
            pass
    assert found.before == 5 and found.peak in (6, 7, 9) and found.grown == found.peak - 5
    with peak_of(lambda: None) as unknown:
        pass
    assert unknown == Peak(None, None) and unknown.grown is None


def test_anonymous_memory_grows_with_an_array():
    before = anonymous_bytes()
    if before is None:
        pytest.skip("no /proc")
    array = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # never memory that was free
    for _ in range(50):
        array.write(bytes(1_000_000))
    assert 45e6 < anonymous_bytes() - before < 60e6
    array.close()
