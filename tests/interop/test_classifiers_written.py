"""Classifiers of sequences compute in llm3 what they compute in transformers, and are written to the same place."""

import numpy as np
import pytest

from llm3.interop.folder import open_folder
from tests.helpers.tiny_hf import FAMILIES, VOCAB, logits, make, transformers
from tests.helpers.tiny_world import class_logits, completed, float32_model, read_params, tensors, write_again

NAMES = {0: "no", 1: "yes", 2: "maybe"}
LABELS = {"num_labels": 3, "id2label": NAMES, "label2id": {label: i for i, label in NAMES.items()}}
FAMILY_NAMES = [name for name in FAMILIES if " " not in name and name not in ("xlm-roberta", "modernbert")]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_classifier_is_read_computed_and_written_with_its_labels(name, tmp_path):
    kind, _, fields = FAMILIES[name]
    pad = {"pad_token_id": 1 if name == "roberta" else 0}
    model = make(kind, f"{kind}ForSequenceClassification", fields | LABELS | pad)
    model.save_pretrained(tmp_path / "source")
    folder = open_folder(str(tmp_path / "source"), None, "model")
    assert folder.labels == ("no", "yes", "maybe")
    ours = float32_model(folder)
    text = np.random.default_rng(0).integers(3, VOCAB, 12)
    np.testing.assert_allclose(
        class_logits(ours, completed(ours, read_params(folder)), text), logits(model, text), atol=1e-4
    )
    to = write_again(folder, tmp_path / "to")
    theirs, written = tensors(tmp_path / "source"), tensors(to)
    assert written.keys() == theirs.keys()
    for each, value in theirs.items():
        np.testing.assert_array_equal(written[each], value, err_msg=each)
    found, info = transformers.AutoModelForSequenceClassification.from_pretrained(to, output_loading_info=True)
    assert not any(info.values()), info
    assert type(found).__name__ == type(model).__name__ and found.config.id2label == NAMES
