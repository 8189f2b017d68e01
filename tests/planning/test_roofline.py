"""The estimate of a step: memory compared with the compiler, activations, collectives and seconds by formula."""

import collections
import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.config.schema import AdapterConfig, MeshConfig, ModelConfig, RunConfig, StageConfig
from llm3.distributed.machines import links, parse
from llm3.distributed.mesh_axes import MESH_AXES
from llm3.planning import trace
from llm3.planning.hlo import collective_bytes
from llm3.planning.plan import plan_phases
from llm3.planning.roofline import Collective, Times, collectives, lowest_layer, times
from llm3.stages.stage import Stage, plan_stage
from llm3.tree import size
from tests.distributed.test_scaling import expected_bytes
from tests.helpers.meshes import mesh_of

LAYERS, D, HEADS, KV, FF, VOCAB, T = 4, 64, 8, 8, 128, 320, 64
WINDOWS = {"window": 8, "full_attention_layers": (1,), "window_rope_theta": 100.0}
LORA = {"train": "lora", "adapters": {"x": AdapterConfig(rank=4)}, "start": {"stage": "a", "fresh": [".*/lora/.*"]}}


def config_of(stage=None, mesh=None, **model) -> RunConfig:
    """A run of one stage "s", on 16 windows a step."""
    shape = {"layers": LAYERS, "d_model": D, "heads": HEADS, "kv_heads": KV, "d_ff": FF, "compute_dtype": "bfloat16"}
    fields = {
        "kind": "posttrain",
        "data": {"a": 1.0},
        "steps": 10,
        "batch_size": 16,
        "sequence_length": T,
        "start": "a",
    }
    return RunConfig(
        model=ModelConfig(**shape | model),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        sources={"a": SourceConfig(path="a")},
        stages={"s": StageConfig(**fields | (stage or {}))},
        mesh=MeshConfig(**{"data": 1} | (mesh or {})),
    )


def abstract_mesh(**sizes: int) -> AbstractMesh:
    shape = dict.fromkeys(MESH_AXES, 1) | sizes
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def stage_of(config: RunConfig) -> Stage:
    dtype = config.model.compute_dtype
    return plan_stage(config, "s").computed_in("bfloat16" if dtype == "auto" else dtype)


def step_of(config: RunConfig, mesh=None, index: int = 0) -> trace.Step:
    return trace.step(stage_of(config), mesh or abstract_mesh(), index)


def phase_of(config: RunConfig, mesh, index: int = 0):
    return stage_of(config).phases(mesh)[index]


def compiled(config: RunConfig, mesh) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        phase = phase_of(config, mesh)
        return phase.train_step.lower(phase.abstract_state, stage_of(config).abstract_batch(mesh)).compile()


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        pytest.param({}, {"data": 2, "fsdp": 2, "tensor": 2}, id="all"),
        pytest.param(
            {"train": "top(1)", "frozen": "int8"}, {"fsdp": 4, "context": 2}, id="top", marks=pytest.mark.slow
        ),
        pytest.param(LORA | {"frozen": "compute"}, {"fsdp": 8}, id="lora", marks=pytest.mark.slow),
    ],
)
def test_the_stored_bytes_are_the_arguments_of_the_compiled_step(stage, sizes):
    config, mesh = config_of(stage), mesh_of(8, **sizes)
    stored = trace.stored(phase_of(config, abstract_mesh(**sizes)), stage_of(config), abstract_mesh(**sizes))
    assert stored.arguments == compiled(config, mesh).memory_analysis().argument_size_in_bytes


def test_only_trainable_parameters_have_moments_and_gradients():
    config = config_of({"train": "top(1)"})
    phase = phase_of(config, abstract_mesh(fsdp=2))
    stored = trace.stored(phase, stage_of(config), abstract_mesh(fsdp=2))
    trainable = size(phase.abstract_state.trainable)
    assert stored.gradients == 4 * trainable / 2
    assert stored.moments == pytest.approx(2 * stored.gradients, abs=64)  # and counters
    assert stored.parameters == 4 * size(phase.abstract_params) / 2


KEPT_BY_HAND = {  # bytes kept for the backward pass per token and layer, besides the T^2 of attention
    "full": 2 * D,  # the input
    "dots": 2 * (D + 2 * D + 2 * D + 2 * FF),  # and all matmul results but the last: q, k, v, out, gate, up
}


@pytest.mark.parametrize("policy", KEPT_BY_HAND)
@pytest.mark.slow
def test_kept_activations_follow_the_formula_times_batch_and_layers(policy):
    rows = 16

    def kept(layers: int, rows: int = rows) -> float:
        return step_of(config_of({"batch_size": rows}, layers=layers, remat=policy)).kept

    a_layer = (kept(8) - kept(4)) / 4
    assert a_layer == rows * T * KEPT_BY_HAND[policy]
    assert kept(4, 2 * rows) == 2 * kept(4)


def test_without_remat_the_weights_of_attention_are_kept_for_every_pair_of_positions():
    def a_layer(length: int) -> float:
        of = {n: step_of(config_of({"sequence_length": length}, layers=n)).kept for n in (2, 4)}
        return (of[4] - of[2]) / 2

    per_pair = (a_layer(4 * T) / 4 - a_layer(T)) / (16 * HEADS * (4 * T * T - T * T))
    assert per_pair == 2  # bytes


def test_a_long_window_holds_its_scores_in_float32_and_its_weights_or_those_of_a_block():
    """The same products, but for blocks of later keys, which no query reads, and scores that are computed again."""
    length, block = 2048, 512
    shape = {"batch_size": 1, "sequence_length": length}
    fields = {"remat": "full", "layers": 2, "vocab_block": 64}
    plain, blocks = (step_of(config_of(shape, attention=name, **fields)) for name in ("plain", "auto"))
    for step, held, most in ((plain, length, 7), (blocks, block, 9)):
        scores = HEADS * held * held
        assert 6 * scores < step.temporary < most * scores
        assert list(step.largest)[:2] == [f"{kind}[1,{HEADS},{held},{held}]" for kind in ("float32", "bfloat16")]
    product, met = 2 * HEADS * length * length * (D // HEADS), (length / block + 1) / 2 / (length / block)
    # of the 2 layers, twice 2 products forward and 4 backward, of which blocks compute a fifth
    assert plain.flops - blocks.flops == 2 * product * (8 - 9 * met)


def test_logits_in_blocks_are_not_held_at_once():
    """All logits in float32, as they are and less their maximum, and their gradients in bfloat16, compared with those
    of an eighth of the vocabulary.
    """
    vocab, block = 8192, 1024
    configs = [config_of(layers=1, remat="full", vocab_block=block) for block in (0, block)]
    large = [dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=vocab)) for config in configs]
    whole, blocks = (step_of(config).temporary for config in large)
    saved = 16 * T * (vocab - block) * (4 + 4 + 2)
    assert 0.9 * saved < whole - blocks < 1.1 * saved


def test_every_device_holds_the_whole_kernel_of_a_head_in_blocks_and_each_block_moves_its_own_part():
    vocab, mesh = 8192, abstract_mesh(fsdp=4)
    whole, blocks = (
        step_of(dataclasses.replace(config_of(vocab_block=block), tokenizer=TokenizerConfig(vocab_size=vocab)), mesh)
        for block in (0, 256)
    )
    assert any(array == f"bfloat16[{vocab},{D}]" for array in blocks.largest)
    assert blocks.moved < whole.moved


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        ({}, {}),
        ({}, {"remat": "full", "vocab_block": 48}),
        ({"micro_batches": 4}, {"remat": "dots", "tie_embeddings": False}),
        ({}, {"kv_heads": 4, "qk_norm": "head"}),
        ({}, {"block": "sandwich", "attention_softcap": 5.0, "gated_mlp": False, "vocab_multiple": 8} | WINDOWS),
        ({}, {"block": "parallel", "positions": "learned", "max_positions": T, "token_types": 2, "mlp_bias": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["1", "8"])
def test_the_traced_flops_of_a_device_are_its_share_of_the_formula(stage, model, sizes):
    config, mesh = config_of(stage, **model), abstract_mesh(**sizes)
    expected = phase_of(config, mesh).hardware_flops_per_step / mesh.size
    assert step_of(config, mesh).flops == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        ({"train": "top(2)"}, {"remat": "full"}),
        (LORA, {"remat": "full"}),
        ({"kind": "finetune", "objective": "classify"}, {"pool": "mean"}),
    ],
    ids=["top", "lora", "classify"],
)
@pytest.mark.slow
def test_loops_and_work_that_tensor_does_not_shard_cost_a_little_more_than_the_formula(stage, model):
    """The trace adds the gradient of the lowest layer's input, the narrow side of an adapter, and the classes."""
    config = config_of(stage, **model)
    for mesh in (abstract_mesh(), abstract_mesh(tensor=2)):
        share = step_of(config, mesh).flops / (phase_of(config, mesh).hardware_flops_per_step / mesh.size)
        assert 1 <= share < 1.1


def test_run_bench_and_plan_divide_the_same_model_flops_by_time_and_peak():
    """Whatever is computed again, and however windows are cut."""
    plain, again = (config_of({"train": "top(2)"}, **model) for model in ({}, {"remat": "full", "vocab_block": 48}))
    once = phase_of(plain, abstract_mesh()).flops_per_step
    planned = plan_phases(stage_of(again), MeshConfig(data=1, context=2), parse("h100x2"), ("full",))[0]
    phases = [phase_of(again, abstract_mesh()), phase_of(plain, abstract_mesh(context=2)), planned.phase]
    assert [each.flops_per_step for each in phases] == [once] * 3
    assert all(each.hardware_flops_per_step > once for each in phases)


def test_a_device_has_its_share_of_batch_heads_and_length():
    meshes = abstract_mesh(), abstract_mesh(data=2, context=2)
    alone, cut = (step_of(config_of(remat="full"), mesh).kept for mesh in meshes)
    assert cut == alone / 4
    scores = [step_of(config_of(layers=2), abstract_mesh(tensor=n)).largest for n in (1, 2)]
    assert any(f"16,{HEADS},{T},{T}]" in array for array in scores[0])
    assert any(f"16,{HEADS // 2},{T},{T}]" in array for array in scores[1])


def test_sharded_windows_hold_the_keys_and_values_of_all_positions():
    keys_and_values = 2 * 16 * T * KV * (D // HEADS) * 2
    alone, cut = (step_of(config_of(layers=2), abstract_mesh(context=n)).kept for n in (1, 2))
    assert cut == alone / 2 + 2 * keys_and_values / 2


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 8}, id="data", marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, id="fsdp", marks=pytest.mark.slow),
        pytest.param({"context": 8}, id="context", marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, id="data and fsdp"),
    ],
)
@pytest.mark.slow
def test_the_collectives_are_those_of_the_compiled_step(sizes):
    """A CPU computes in float32 and reduces both uses of the embedding: that of the head by an all-reduce over all
    axes, that of the lookup along fsdp first. Everything else it reduce-scatters by an all-reduce.
    """
    config = config_of({"kind": "pretrain", "start": None}, compute_dtype="float32")
    text = compiled(config, mesh_of(8, **sizes)).as_text()
    gathered = reduced = 0.0
    fsdp = sizes.get("fsdp", 1)
    for each in collectives(stage_of(config), _on(config, sizes), abstract_mesh(**sizes)):
        times = 1.0
        if each.what == "embed/embedding":
            times = 1 + 1 / fsdp if each.kind == "reduce-scatter" else 1 + (fsdp == 1)
        gathered += each.bytes * (each.kind == "all-gather")
        reduced += each.bytes * times * (each.kind != "all-gather")
    sent = collections.Counter(collective_bytes(text))
    assert gathered == pytest.approx(sent["all-gather"], rel=0.05, abs=1024 * LAYERS)
    assert reduced == pytest.approx(sent["all-reduce"] + sent["reduce-scatter"], rel=0.05, abs=1024 * LAYERS)


def _on(config, sizes):
    return phase_of(config, abstract_mesh(**sizes))


def test_tensor_gathers_and_scatters_activations_twice_a_layer_in_each_pass_and_at_both_ends():
    config = config_of()
    sent = collectives(stage_of(config), _on(config, {"tensor": 4}), abstract_mesh(tensor=4))
    size, times = 16 * T * D * 2, 4 * LAYERS + 2
    assert sent == [Collective("tensor", "activations", kind, size, times) for kind in ("all-gather", "reduce-scatter")]


def test_nothing_is_regathered_or_reduced_below_the_lowest_trainable_layer():
    config, mesh = config_of({"train": "top(1)"}, tie_embeddings=False), abstract_mesh(fsdp=4)
    phase = phase_of(config, mesh)
    sent = collectives(stage_of(config), phase, mesh)
    assert lowest_layer(phase) == LAYERS - 1
    of = {
        kind: {each.what: each.times for each in sent if each.kind == kind} for kind in ("all-gather", "reduce-scatter")
    }
    assert of["all-gather"]["layers/0:3/mlp/up/kernel"] == 1 and of["all-gather"]["layers/3:4/mlp/up/kernel"] == 2
    assert all(what.startswith(("layers/3:4/", "final_norm/", "lm_head/")) for what in of["reduce-scatter"])


def test_each_micro_batch_does_it_again_but_no_block_of_the_vocabulary():
    plain, cut = config_of(tie_embeddings=False), config_of({"micro_batches": 2}, tie_embeddings=False, vocab_block=16)
    sent = [
        {
            (each.what, each.kind): each.times
            for each in collectives(stage_of(config), _on(config, {"fsdp": 8}), abstract_mesh(fsdp=8))
        }
        for config in (plain, cut)
    ]
    layer, head = ("layers/0:4/mlp/up/kernel", "all-gather"), ("lm_head/kernel", "reduce-scatter")
    assert (sent[0][layer], sent[1][layer]) == (2, 4)
    assert (sent[0][head], sent[1][head]) == (1, 2)
    assert {each.times for each in collectives(stage_of(cut), _on(cut, {"data": 8}), abstract_mesh(data=8))} == {1}


def test_seconds_are_work_over_rates_and_an_all_reduce_takes_a_gather_and_a_scatter():
    machine = parse("h100x8")
    link = links(machine, {"fsdp": 8, "data": 1})
    sent = [Collective("fsdp", "x", "all-gather", 1e9, 3), Collective("fsdp", "x", "all-reduce", 1e9, 1)]
    found = times(989e12, 3.35e12, sent, machine, link)
    assert found.compute == pytest.approx(1 / 0.6) and found.memory == pytest.approx(1)
    assert found.collectives == {"fsdp": pytest.approx(5 * 1e9 * 7 / 8 / 450e9)}


def test_a_step_takes_between_the_longest_part_and_their_sum():
    found = Times(3.0, 1.0, {"fsdp": 2.0, "data": 0.5})
    assert (found.overlapped, found.sequential) == (3.0, 6.5)


def test_a_sweep_of_phases_is_estimated_each_with_what_trains_in_it():
    config = config_of({"train": "top(1)", "unfreeze": [[5, "all"]]}, remat="full")
    first, last = (step_of(config, index=index) for index in (0, 1))
    assert first.flops < last.flops and first.kept < last.kept


def test_the_formula_of_the_collectives_is_that_of_the_scaling_test():
    """On the same model; see test_scaling for what a GPU or TPU compiler merges."""
    config = config_of({"kind": "pretrain", "start": None, "batch_size": 8}, layers=2, compute_dtype="float32")
    found = collectives(stage_of(config), _on(config, {"fsdp": 8}), abstract_mesh(fsdp=8))
    gathered = sum(each.bytes for each in found if each.kind == "all-gather")
    assert gathered == pytest.approx(expected_bytes(8, fsdp=8)["all-gather"], rel=0.01)
