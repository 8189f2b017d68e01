"""One step of fine-tuning changes a model of others by the gradients that torch computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm3.config.model_schema import AdapterConfig
from llm3.config.schema import OptimizerConfig, StageConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import place_batch
from llm3.interop.folder import open_folder
from llm3.interop.write import write_folder
from llm3.models.lora import merged
from llm3.models.transformer import abstract
from llm3.segments import canonical
from llm3.training.phase import build
from llm3.tree import flatten, unflatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import COMPILE_FAST, TASK
from tests.helpers.tiny_hf import FAMILIES, VOCAB, make, torch, transformers
from tests.helpers.tiny_world import completed, float32_model, packed, read_params

NAMES = ["qwen3", "gemma2", "gpt_neox", "bert"]  # pre-norm, sandwich, parallel and post-norm blocks
CLASSES, LENGTHS, LABELS = 3, (9, 6), (2, 1)
ADAPTER = AdapterConfig(rank=2, alpha=6)
RULES = {"all": ["all"], "top": ["top(1)"], "lora": ["lora", "head/.*"]}


def documents() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, VOCAB, length) for length in LENGTHS]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_follows_the_gradients_of_torch(name, rule, tmp_path):
    kind, _, fields = FAMILIES[name]
    hf = make(kind, f"{kind}ForSequenceClassification", fields | {"num_labels": CLASSES, "pad_token_id": 0})
    hf.save_pretrained(tmp_path / "source")
    folder = open_folder(str(tmp_path / "source"), None, "model")
    model, params = float32_model(folder), read_params(folder)
    if rule == "lora":
        model = dataclasses.replace(model, adapters=(("new", ADAPTER),))
        params = with_adapters(model, params)
        write_folder(
            tmp_path, merged(params, model.adapters), model, family=folder.family, max_length=64, labels=("a", "b", "c")
        )
        hf = type(hf).from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = torch_gradients(hf, tmp_path / "gradients")
    if rule == "lora":
        expected = flatten(params) | expected | adapter_gradients(flatten(params), expected)
    params = completed(model, params)
    found = step_gradients(model, params, RULES[rule])
    if folder.family != "bert":
        del found["head/bias"]  # which transformers' class has not
    trained, largest = 0, max(np.abs(each).max() for each in expected.values())
    for path, gradient in found.items():
        wanted = np.asarray(expected.get(path, np.zeros_like(gradient)), np.float32)
        for layer, (each, other) in enumerate(zip(gradient, wanted, strict=True)):
            if is_trained(path, layer, rule):
                np.testing.assert_allclose(each, other, atol=1e-3 * np.abs(wanted).max() + 1e-6 * largest, err_msg=path)
                trained += 1
            else:
                assert not each.any(), f"{path} is frozen"
    assert trained > 5


def is_trained(path: str, layer: int, rule: str) -> bool:
    if rule == "lora":
        return "/lora/" in path or path.startswith("head/")
    return rule == "all" or (layer == 2 if path.startswith("layers/") else not path.startswith("embed/"))


def step_gradients(model, params: dict, rules: list[str]) -> dict[str, np.ndarray]:
    """Old minus new parameters of one step of gradient descent with rate 1 on two packed documents."""
    tokens, positions, segments = packed(*documents(), length=16)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for end, label in zip(np.cumsum(LENGTHS), LABELS, strict=True):
        targets[0, end - 1], weights[0, end - 1] = label, 1
    batch = Batch(
        **{name: np.zeros_like(tokens) for name in Batch._fields}
        | {"tokens": tokens, "positions": positions, "segments": segments, "targets": targets, "weights": weights}
    )
    plain = OptimizerConfig("sgd", 1.0, "constant", weight_decay=0.0, clip_norm=0.0)
    stage = StageConfig(
        "finetune", {"source": 1.0}, 10, 1, 16, start="pretrain", objective="classify", train=rules, optimizer=plain
    )
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        phase = build(stage, model, mesh, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
        placed = jax.tree.map(
            lambda x, like: jax.device_put(jnp.asarray(x), like.sharding), params, phase.abstract_params
        )
        state = phase.state(placed)
        step = phase.train_step.lower(state, place_batch(mesh, batch)).compile(compiler_options=COMPILE_FAST)
        after = flatten(jax.device_get(phase.params(step(state, place_batch(mesh, batch))[0])))
    return {path: np.asarray(before) - after[path] for path, before in flatten(params).items()}


def torch_gradients(hf, folder) -> dict[str, np.ndarray]:
    """torch's gradients of the mean loss, by canonical path: saved and read as if they were a model's leaves."""
    losses = []
    for document, label in zip(documents(), LABELS, strict=True):
        found = hf(torch.from_numpy(document[None])).logits
        losses.append(torch.nn.functional.cross_entropy(found, torch.tensor([label])))
    (sum(losses) / len(losses)).backward()
    hf.config.save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.architectures = [type(hf).__name__]
    config.save_pretrained(folder)
    gradients = {name: each.grad.numpy().copy() for name, each in hf.named_parameters()}
    save_file(gradients, folder / "model.safetensors")
    return flatten(jax.device_get(read_params(open_folder(str(folder), None, "gradients"))))


def with_adapters(model, params: dict) -> dict:
    """The parameters with adapters away from their start, so that both factors have gradients."""
    random = np.random.default_rng(1)
    shapes = flatten(canonical(abstract(model).shapes))
    made = {
        path: 0.1 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in shapes.items()
        if "/lora/" in path
    }
    return unflatten(flatten(jax.device_get(params)) | made)


def adapter_gradients(params: dict, kernels: dict) -> dict[str, np.ndarray]:
    """The gradients of A and B from those of the merged kernels W + s A B: s dW B^T and s A^T dW."""
    scale, made = ADAPTER.alpha / ADAPTER.rank, {}
    for path in params:
        if path.endswith("/lora/new/a"):
            kernel = kernels[path.removesuffix("/lora/new/a") + "/kernel"]
            a, b = params[path], params[path[:-1] + "b"]
            inputs = a.ndim - 2  # without the axes of layers and of the rank
            by_output, by_input = list(zip(kernel, b, strict=True)), list(zip(kernel, a, strict=True))
            of_a = [np.tensordot(w, y, [range(inputs, w.ndim), range(1, y.ndim)]) for w, y in by_output]
            of_b = [np.tensordot(x, w, [range(inputs), range(inputs)]) for w, x in by_input]
            made |= {path: scale * np.stack(of_a), path[:-1] + "b": scale * np.stack(of_b)}
    return made
