"""The savings of partial training at the size of configs/bench/cpu_small.py, counted without running a step."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llm3.config import load as configfile
from llm3.data.batch import Batch
from llm3.optim.optimizer import state_bytes
from llm3.training.phase import build
from llm3.tree import size
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import COMPILE_FAST, TASK

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "bench" / "cpu_small.py"


@functools.cache
def counted(rule: str) -> dict[str, float]:
    """FLOPs by formula and by the compiler, and bytes of temporaries and optimizer state."""
    config = configfile.load(str(CONFIG))
    stage = replace(config.stages["finetune"], train=rule)
    filled = {
        "vocab_size": config.tokenizer.vocab_size,
        "classes": 12,
        "max_output_positions": 1,
        "compute_dtype": "float32",
    }
    mesh, shape = mesh_of(1), (stage.batch_size, stage.sequence_length)
    full = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(*[full] * 4, jax.ShapeDtypeStruct(shape, jnp.float32))
    with jax.set_mesh(mesh):
        model = replace(config.model, **filled)
        fresh = lambda path: path.startswith("head/")  # noqa: E731
        phase = build(stage, model, mesh, task=TASK, fresh=fresh, seed=0, where="stage")[0]
        step = phase.train_step.lower(phase.abstract_state, batch).compile(compiler_options=COMPILE_FAST)
    return {
        "flops": phase.flops_per_step,
        "compiler_flops": step.cost_analysis()["flops"],
        "temp_bytes": step.memory_analysis().temp_size_in_bytes,
        "moments": state_bytes(phase.abstract_state.opt) - 2 * 4,  # without the counts of Adam and the schedule
        "trainable": size(phase.abstract_state.trainable),
    }


def test_the_top_two_of_eight_layers_take_half_of_the_flops_and_memory_at_most_and_their_share_of_the_moments():
    part, full = counted("top(2)"), counted("all")
    for key in ("flops", "compiler_flops", "temp_bytes"):
        assert part[key] <= 0.5 * full[key], key
    for each in (part, full):
        assert each["moments"] == 2 * 4 * each["trainable"]
        # the full step; the rest is the optimizer, norms and softmax
        assert each["flops"] < each["compiler_flops"] < 1.02 * each["flops"]
    assert part["trainable"] < 0.2 * full["trainable"]


def test_two_middle_layers_cost_less_than_all_and_as_the_top_from_the_lower_one_on_less_two_layers_weight_gradients():
    middle, top, full = counted("layers(4,5)"), counted("layers[4:]/.*"), counted("all")
    assert middle["flops"] < full["flops"] and middle["temp_bytes"] < full["temp_bytes"]
    d, ff, tokens = 256, 704, 16 * 256
    at_all = 2 * tokens * d * 2 * d  # keys and values; the last layer computes the rest at one position per row
    rest = 2 * d * (2 * d + 3 * ff)
    saved = (at_all + tokens * rest) + (at_all + 16 * rest)  # of layers 6 and 7
    assert top["flops"] - middle["flops"] == saved
    assert top["compiler_flops"] - middle["compiler_flops"] == pytest.approx(saved, rel=0.02)
