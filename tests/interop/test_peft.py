"""PEFT computes with exported adapters what llm3 computes, in every family, fused modules included."""

import copy

import jax
import numpy as np
import pytest

from llm3.config.model_schema import AdapterConfig
from llm3.errors import UserError
from llm3.interop.adapters import write_adapters
from llm3.interop.folder import open_folder
from llm3.models.transformer import abstract
from llm3.segments import canonical
from llm3.tree import flatten, unflatten
from tests.helpers.tiny_hf import FAMILIES, VOCAB, logits, make, saved, tiny
from tests.helpers.tiny_world import class_logits, completed, float32_model, packed_logits, read_params

peft = pytest.importorskip("peft", reason="needs pip install 'llm3[hf]'")

ATTENTION = ("query", "key", "value", "out")
ONE_OF_EACH = [name for name in FAMILIES if " " not in name and name != "xlm-roberta"]
FUSED = ("phi3", "gpt2", "gpt_neox", "modernbert")


def adapted(name: str, folder, adapter: AdapterConfig):
    """The model of a folder with a random adapter that changes its logits: config and parameters."""
    model = float32_model(folder, adapters=(("medical", adapter),))
    random = np.random.default_rng(0)
    made = {}
    for path, leaf in flatten(canonical(abstract(model).shapes)).items():
        if "/lora/" in path:
            noise = random.standard_normal(leaf.shape).astype(np.float32)
            made[path] = 1 + 0.2 * noise if path.endswith("/magnitude") else 0.1 * noise
    return model, unflatten(flatten(read_params(folder)) | made)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *((name, AdapterConfig(rank=2, alpha=6)) for name in ONE_OF_EACH),
        *((name, AdapterConfig(rank=3, alpha=4, rslora=True, targets=("value", "query", "up"))) for name in FUSED),
        *((name, AdapterConfig(rank=2, alpha=6, dora=True, targets=ATTENTION)) for name in (*FUSED, "bert", "olmo2")),
    ],
)
def test_peft_computes_the_logits_of_llm3(name, adapter, tmp_path):
    folder = open_folder(str(saved(name, tmp_path / "source")), None, "model")
    model, params = adapted(name, folder, adapter)
    write_adapters(tmp_path, jax.device_get(params), model, folder.family, None, False, "float32")
    text = np.random.default_rng(1).integers(3, VOCAB, 16)
    found = peft.PeftModel.from_pretrained(copy.deepcopy(tiny(name)), tmp_path / "medical").eval()
    expected = packed_logits(model, params, text[:3], text, length=20)[1]
    np.testing.assert_allclose(logits(found, text), expected, atol=1e-4)
    assert np.abs(expected - logits(tiny(name), text)).max() > 0.1


@pytest.mark.parametrize("name", ["bert", "roberta", "qwen3"])
def test_peft_puts_the_head_into_transformers_classifier(name, tmp_path):
    kind, _, fields = FAMILIES[name]
    pad = 1 if name == "roberta" else 0
    hf = make(kind, f"{kind}ForSequenceClassification", fields | {"num_labels": 3, "pad_token_id": pad})
    hf.save_pretrained(tmp_path / "source")
    folder = open_folder(str(tmp_path / "source"), None, "model")
    model, params = adapted(name, folder, AdapterConfig(rank=2, alpha=6))
    params = completed(model, params)
    trained = {part: jax.tree.map(lambda x: x + 0.3, params[part]) for part in ("head", "pooler") if part in params}
    write_adapters(tmp_path, params | trained, model, folder.family, None, True, "float32")
    text = np.random.default_rng(1).integers(3, VOCAB, 12)
    found = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "medical").eval()
    expected = class_logits(model, params | trained, text)
    if model.causal:  # whose class has no bias
        expected = expected - trained["head"]["bias"]
    np.testing.assert_allclose(logits(found, text), expected, atol=1e-4)
    assert np.abs(expected - logits(hf, text)).max() > 0.1


def test_dora_on_a_part_of_a_fused_module_is_refused_by_name(tmp_path):
    folder = open_folder(str(saved("phi3", tmp_path / "source")), None, "model")
    adapter = AdapterConfig(rank=2, dora=True, targets=("query", "value"))
    model, params = adapted("phi3", folder, adapter)
    with pytest.raises(UserError, match=r"'medical': DoRA on query, but not on .*attention/key.*--format=merged"):
        write_adapters(tmp_path, params, model, "phi3", None, False, "float32")
    assert not (tmp_path / "medical").exists()
