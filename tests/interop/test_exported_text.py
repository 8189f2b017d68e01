"""What transformers makes of exported text and heads: the same ids and the same classes as in llm3."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.cli.export import export
from llm3.data.chat_templates import question
from llm3.data.encoding import encode_pieces
from llm3.data.tokenizer import Tokenizer
from llm3.interop.folder import open_folder
from llm3.models.transformer import abstract
from llm3.segments import segmented
from tests.helpers import tiny_foreign
from tests.helpers.tiny import jit, make_params
from tests.helpers.tiny_export import STAGE, write_run
from tests.helpers.tiny_hf import make, torch, transformers
from tests.helpers.tiny_world import completed, float32_model, packed, read_params

TEXTS = ["the quick brown fox", "is it so", "yes"]
LABELS = ("no", "yes", "maybe")


def run_of(kind: str, model_class: str, text: str, folder, labels=(), **fields):
    """A run that began with a model of transformers and somebody else's tokenizer: model, parameters, tokenizer."""
    files = getattr(tiny_foreign, text)(folder / "tokenizer")
    named = json.loads((files / "tokenizer_config.json").read_text())
    plain = {name: each["content"] if isinstance(each, dict) else each for name, each in named.items()}
    (files / "tokenizer_config.json").write_text(json.dumps(plain))  # transformers 5 wants names, not objects
    tokenizer = Tokenizer.load(files)
    make(kind, model_class, fields | {"vocab_size": tokenizer.vocab_size + 3}).save_pretrained(folder / "source")
    found = open_folder(str(folder / "source"), None, "model")
    model = float32_model(found, classes=len(labels))
    if labels and found.family == "bert":
        model = dataclasses.replace(model, pooler=True)
    params = completed(model, read_params(found))
    if labels:
        heads = {name: value for name, value in make_params(model).items() if name in ("head", "pooler")}
        params = params | heads
    meta = {"model_family": found.family, "model_max_length": found.max_length}
    write_run(folder / "run", model, params, labels, template=tokenizer.chat_template, text=tokenizer, **meta)
    return model, params, tokenizer


@pytest.mark.parametrize(
    ("kind", "model_class", "text"),
    [
        ("Llama", "LlamaForCausalLM", "llama3"),
        ("Qwen2", "Qwen2ForCausalLM", "qwen"),
        ("Bert", "BertForMaskedLM", "bert"),
    ],
)
def test_transformers_classifies_a_padded_batch_of_texts_as_llm3_does(kind, model_class, text, tmp_path):
    model, params, tokenizer = run_of(kind, model_class, text, tmp_path, LABELS)
    export(tmp_path / "run", STAGE, tmp_path / "out", "merged", "latest", None)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = encode(TEXTS, padding=True, truncation=False, return_tensors="pt")
    with torch.no_grad():
        logits = found(**batch).logits.numpy()
    if model.causal:  # transformers' class has no bias
        logits = logits + np.asarray(params["head"]["bias"])

    @jit
    def run(params, *window):
        built = nnx.merge(abstract(model).graph, params)
        return built.class_logits(built(*window), window[2])

    for each, expected in zip(TEXTS, logits, strict=True):
        ids = [*tokenizer.starts, *tokenizer.encode(each), tokenizer.eos_id]
        window = packed(np.array(ids), length=16)
        ours = jax.device_get(run(segmented(params, ((0, model.layers),)), *window))[0, len(ids) - 1]
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert found.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize(
    ("kind", "model_class", "text"), [("Llama", "LlamaForCausalLM", "llama3"), ("Qwen2", "Qwen2ForCausalLM", "qwen")]
)
def test_transformers_writes_a_chat_as_llm3_does(kind, model_class, text, tmp_path):
    _, _, tokenizer = run_of(kind, model_class, text, tmp_path)
    export(tmp_path / "run", STAGE, tmp_path / "out", "merged", "latest", None)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Is it so?"}]
    ids = found.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_pieces(question("Is it so?", tokenizer.chat_template, tokenizer).before, tokenizer)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert sorted(model.generation_config.eos_token_id) == sorted(tokenizer.end_ids)
