"""The predictions of an evaluation, written and read."""

import numpy as np
import pyarrow.parquet
import pytest

from llm3.errors import UserError
from llm3.report.predictions import predictions_file, read_predictions, write_predictions

COLUMNS = {
    "item": np.array([0, 3, 4]),
    "truth": ["a", "b", "ü"],
    "score": np.array([1.0, 0.0, np.nan]),
    "probabilities": np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], np.float32),
    "references": [["a", "A"], ["b", "B"], ["ü", "Ü"]],
    "classes": ["a", "b"],
}


def test_predictions_are_read_as_written(tmp_path):
    assert read_predictions(tmp_path, "topic") is None
    write_predictions(tmp_path, "topic", COLUMNS)
    found = read_predictions(tmp_path, "topic")
    assert list(found) == list(COLUMNS)
    for name, values in COLUMNS.items():
        np.testing.assert_array_equal(found[name], np.asarray(values))
    assert found["item"].dtype == np.int64 and found["probabilities"].dtype == np.float32


def test_equal_predictions_give_equal_bytes_in_a_file_that_any_reader_of_parquet_reads(tmp_path):
    for name in ("one", "other"):
        write_predictions(tmp_path / name, "topic", COLUMNS)
    one, other = (predictions_file(tmp_path / name, "topic") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    table = pyarrow.parquet.ParquetFile(one)
    assert table.metadata.row_group(0).column(0).compression == "ZSTD"
    assert table.read().column("probabilities").to_pylist()[2] == [0.125, 0.875]
    assert [each.name for each in one.parent.iterdir()] == ["topic.parquet"]


def test_lists_may_differ_in_length_and_a_file_may_have_no_items(tmp_path):
    write_predictions(tmp_path, "choice", {"item": np.arange(2), "scores": [[1.0], [2.0, 3.0]]})
    write_predictions(tmp_path, "none", {"item": np.arange(0), "probabilities": np.zeros((0, 3)), "classes": []})
    assert [each.tolist() for each in read_predictions(tmp_path, "choice")["scores"]] == [[1.0], [2.0, 3.0]]
    assert len(read_predictions(tmp_path, "none")["item"]) == 0


def test_half_a_surrogate_pair_of_a_text_is_replaced(tmp_path):
    write_predictions(tmp_path, "topic", {"truth": ["\ud83d", "a"]})
    assert read_predictions(tmp_path, "topic")["truth"].tolist() == ["?", "a"]


def test_columns_of_different_lengths_and_a_damaged_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="different lengths: item 2, score 1"):
        write_predictions(tmp_path, "topic", {"item": np.arange(2), "score": np.zeros(1)})
    write_predictions(tmp_path, "topic", COLUMNS)
    path = predictions_file(tmp_path, "topic")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"topic\.parquet cannot be read"):
        read_predictions(tmp_path, "topic")
