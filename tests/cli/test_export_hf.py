"""transformers and PEFT compute the same logits from exported files as llm3."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.config.schema import ModelConfig
from llm3.data.chat_templates import question
from llm3.data.encoding import encode_pieces
from llm3.models.transformer import abstract
from llm3.segments import segmented
from llm3.tree import flatten, unflatten
from tests.helpers.tiny import LENGTH, jit
from tests.helpers.tiny_export import ADAPTERS, ADDED, SPELLED, TEXTS, model, tensors, tokenizer, write_run, written

pytestmark = pytest.mark.slow

LLAMA = {"attention_bias": "all", "tie_embeddings": False, "rope_theta": 100.0, "norm_epsilon": 1e-5}
QWEN3 = {"qk_norm": "head"}
FAMILIES = {"LlamaForCausalLM": LLAMA, "Qwen3ForCausalLM": QWEN3}


def some_tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, tokenizer().vocab_size, (2, LENGTH))


def apply(config: ModelConfig, params: dict, head: bool = False) -> np.ndarray:
    """llm3's logits: of the LM head [B, T, V] or of the task head [B, T, C]."""
    tokens = some_tokens().astype(np.int32)
    positions, segments = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape), np.ones_like(tokens)

    @jit
    def run(params):
        built = nnx.merge(abstract(config).graph, params)
        hidden = built(tokens, positions, segments)
        return built.class_logits(hidden, segments) if head else built.logits(hidden)

    return jax.device_get(run(segmented(params, ((0, config.layers),))))


def only(config: ModelConfig, *names: str) -> ModelConfig:
    """The model with only these adapters active."""
    chosen = [(name, dataclasses.replace(each, active=name in names)) for name, each in config.adapters]
    return dataclasses.replace(config, adapters=tuple(chosen))


@pytest.fixture(scope="module")
def hf():
    """transformers, with torch on one thread."""
    reason = "needs torch and pip install 'llm3[hf]'"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    torch.set_num_threads(1)
    return transformers


@pytest.fixture(scope="module")
def peft(hf):
    return pytest.importorskip("peft", reason="needs pip install 'llm3[hf]'")


def loaded(hf, directory):
    """transformers' model, with every weight from the files and every file's weight used."""
    found, info = hf.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(some_tokens())).logits.numpy()


def assert_equal_logits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_logits_of_llm3(hf, family, tmp_path):
    found = loaded(hf, written(tmp_path, **FAMILIES[family]))
    assert type(found).__name__ == family
    assert next(found.parameters()).dtype.itemsize == 4
    assert_equal_logits(torch_logits(found), apply(*model(**FAMILIES[family])))
    generation = found.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("family", "kind"), [*(("LlamaForCausalLM", kind) for kind in ADAPTERS), ("Qwen3ForCausalLM", "dora")]
)
def test_the_merged_model_is_the_base_with_its_adapter_by_peft(hf, peft, family, kind, tmp_path):
    changes = FAMILIES[family] | {"adapters": (("medical", ADAPTERS[kind]),)}
    merged = torch_logits(loaded(hf, written(tmp_path, "merged", name="merged", **changes)))
    base = loaded(hf, written(tmp_path, "base", name="base"))
    plain = torch_logits(base)
    adapters = written(tmp_path, "adapters", name="adapters")
    adapted = torch_logits(peft.PeftModel.from_pretrained(base, adapters / "medical").eval())
    expected = apply(*model(**changes))
    assert_equal_logits(merged, expected)
    assert_equal_logits(adapted, expected)
    assert np.abs(expected - plain).max() > 0.1


def test_two_adapters_lie_side_by_side(hf, peft, tmp_path):
    pair = (("medical", ADAPTERS["lora"]), ("legal", dataclasses.replace(ADAPTERS["rslora"], targets=("up", "key"))))
    config, params = model(**LLAMA, adapters=pair)
    both = torch_logits(loaded(hf, written(tmp_path, "merged", name="merged", **LLAMA, adapters=pair)))
    base = loaded(hf, written(tmp_path, "base", name="base"))
    adapters = written(tmp_path, "adapters", name="adapters")
    found = peft.PeftModel.from_pretrained(base, adapters / "medical", adapter_name="medical").eval()
    found.load_adapter(adapters / "legal", "legal")
    own = {}
    for name in ("medical", "legal"):
        found.set_adapter(name)
        own[name] = torch_logits(found)
        assert_equal_logits(own[name], apply(only(config, name), params))
    assert np.abs(own["medical"] - own["legal"]).max() > 0.1
    found.base_model.set_adapter(["medical", "legal"])
    assert_equal_logits(torch_logits(found), both)
    assert_equal_logits(both, apply(config, params))


def test_peft_saves_what_it_loaded(hf, peft, tmp_path):
    adapters = (("medical", ADAPTERS["some targets"]),)
    base = loaded(hf, written(tmp_path, "base", name="base", **QWEN3, adapters=adapters))
    folder = written(tmp_path, "adapters", name="adapters", base=str(tmp_path / "base")) / "medical"
    found = peft.PeftModel.from_pretrained(base, folder)
    found.save_pretrained(tmp_path / "again")
    ours, theirs = (tensors(each / "adapter_model.safetensors") for each in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    ours, theirs = (json.loads((each / "adapter_config.json").read_text()) for each in (folder, tmp_path / "again"))
    assert ours.pop("target_modules") == sorted(theirs["target_modules"])
    assert ours == {name: theirs[name] for name in ours}
    assert ours["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_head_over_all_tokens_reads_transformers_hidden_states(hf, tmp_path):
    import torch

    changes = QWEN3 | {"classes": 3, "pool": "mean"}
    to = written(tmp_path, labels=("a", "b", "ß"), **changes)
    body = hf.AutoModel.from_pretrained(to)
    with torch.no_grad():
        hidden = body(torch.from_numpy(some_tokens())).last_hidden_state.numpy().mean(axis=1)
    head = tensors(to / "head.safetensors")
    assert_equal_logits(hidden @ head["weight"].T + head["bias"], apply(*model(**changes), head=True)[:, -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_classifies_as_llm3_does(hf, family, tmp_path):
    import torch
    from safetensors.torch import load_file

    changes = FAMILIES[family] | {"classes": 3}
    to = written(tmp_path, labels=("a", "b", "ß"), **changes)
    found = hf.AutoModelForSequenceClassification.from_pretrained(to).eval()
    assert type(found).__name__ == family.replace("CausalLM", "SequenceClassification")
    assert found.config.id2label == {0: "a", 1: "b", 2: "ß"} and found.config.label2id == {"a": 0, "b": 1, "ß": 2}
    expected, (_, params) = apply(*model(**changes), head=True)[:, -1], model(**changes)
    assert_equal_logits(torch_logits(found) + params["head"]["bias"], expected)
    found.score.bias = torch.nn.Parameter(load_file(to / "model.safetensors")["score.bias"])  # as `export` says
    assert_equal_logits(torch_logits(found), expected)
    encode = hf.AutoTokenizer.from_pretrained(to)
    ids = [tokenizer().encode(text) for text in TEXTS]
    assert encode(TEXTS).input_ids == [[1, *each, 2] for each in ids]
    assert encode(TEXTS[0], TEXTS[1]).input_ids == [1, *ids[0], 2, *ids[1], 2]


def test_peft_puts_adapters_and_head_on_a_base_without_a_head(hf, peft, tmp_path):
    """As to transformers, the base could be any model."""
    changes = LLAMA | {"adapters": (("medical", ADAPTERS["lora"]),), "classes": 3}
    adapters = written(tmp_path, "adapters", labels=("a", "b", "ß"), name="adapters", **changes)
    (_, params), (config, plain) = model(**changes), model(**LLAMA)
    write_run(tmp_path / "plain" / "run", config, unflatten({path: flatten(params)[path] for path in flatten(plain)}))
    base = hf.AutoModelForSequenceClassification.from_pretrained(written(tmp_path / "plain"), num_labels=3)
    found = peft.PeftModel.from_pretrained(base, adapters / "medical").eval()
    assert type(found).__name__ == "PeftModelForSequenceClassification"
    expected = apply(*model(**changes), head=True)[:, -1]
    assert_equal_logits(torch_logits(found) + params["head"]["bias"], expected)


@pytest.mark.parametrize(
    "template", [ADDED, SPELLED, "{{ bos_token }}" + ADDED, SPELLED.replace("<|im_end|>", "<|eos|>")]
)
def test_transformers_writes_a_prompt_as_llm3_does(hf, template, tmp_path):
    to = written(tmp_path, run={"template": template})
    found = hf.AutoTokenizer.from_pretrained(to)
    messages = [{"role": "user", "content": "The quick brown fox."}]
    ids = found.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    asked = question("The quick brown fox.", template)
    assert ids == encode_pieces(asked.before, tokenizer())
    answered = found.apply_chat_template([*messages, {"role": "assistant", "content": "jumps"}], return_dict=False)
    answer = [*tokenizer().encode("jumps"), *encode_pieces(asked.end, tokenizer())]
    assert answered[: len(ids) + len(answer)] == [*ids, *answer]
    if template is ADDED:
        assert found.decode(answer, skip_special_tokens=True) == "jumps"


def test_bfloat16_is_loaded_as_that(hf, tmp_path):
    found = hf.AutoModelForCausalLM.from_pretrained(written(tmp_path, dtype="bfloat16"), dtype="auto")
    assert {each.dtype.itemsize for each in found.parameters()} == {2}
    np.testing.assert_allclose(torch_logits(found.float()), apply(*model()), atol=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_tokenizer_gives_the_ids_of_llm3(hf, family, tmp_path):
    to = written(tmp_path, **FAMILIES[family])
    for kind in (hf.AutoTokenizer, hf.PreTrainedTokenizerFast):
        found = kind.from_pretrained(to)
        assert (found.pad_token_id, found.bos_token_id, found.eos_token_id, found.mask_token_id) == (0, 1, 2, 3)
        assert len(found) == tokenizer().vocab_size
        for text in TEXTS:
            ids = tokenizer().encode(text)
            assert found(text, add_special_tokens=False).input_ids == ids
            assert found(text).input_ids == [tokenizer().bos_id, *ids]
            assert found.encode(text) == [tokenizer().bos_id, *ids]
            assert found.decode(ids) == tokenizer().decode(ids)
            assert found.decode(found(text).input_ids, skip_special_tokens=True) == text
