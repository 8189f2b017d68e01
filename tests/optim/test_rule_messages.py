"""What is said of a tied head and of rules that match nothing; shares of step times; FLOPs over codes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llm3 import objectives
from llm3.cli.plan import leaf_bytes
from llm3.config.schema import StageConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import tree_shardings
from llm3.errors import UserError
from llm3.models.flops import step_flops
from llm3.models.transformer import abstract
from llm3.optim.frozen import make_storage
from llm3.optim.partition import make_partition
from llm3.registry import load_plugin
from llm3.report.cost import with_full_step_seconds
from llm3.segments import canonical
from llm3.stages.cost import byte_report
from llm3.training.phase import build, tied_head_notes
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import TASK, jit, model_config
from tests.models.test_flops import ALL_LEAVES, BATCH, LENGTH, LORA, product_flops
from tests.optim.test_partition import trained

TRAINS = ["embed/embedding is trainable, and so is the LM head, which is tied to it"]
FROZEN = ["the LM head is frozen: it is tied to embed/embedding"]


@pytest.mark.parametrize(
    ("rules", "head", "tied", "notes"),
    [
        ("embeddings", "lm", True, TRAINS),
        ("top(1)", "lm", True, FROZEN),
        ("all", "lm", True, []),
        ("embeddings", "task", True, []),
        ("embeddings", "lm", False, []),
    ],
)
def test_training_a_tied_head_says_that_the_embedding_trains_too(rules, head, tied, notes):
    """TRAPS.md, 6."""
    model = model_config(tie_embeddings=tied)
    found = make_partition(canonical(abstract(model).shapes), rules, model.layers)
    assert tied_head_notes(model, found, head) == notes


@pytest.mark.parametrize(
    ("rules", "nearest"), [("not all", "did you mean 'all'"), (["not head/kernel", "not head/bias"], "'head/kernel'")]
)
def test_nothing_to_train_names_the_nearest_and_all_that_a_rule_may_say(rules, nearest):
    with pytest.raises(
        UserError, match=rf"nothing to train; did you mean {nearest.removeprefix('did you mean ')}"
    ) as error:
        trained(rules)
    assert all(name in str(error.value) for name in ("top(N)", "layers(I,...)", "biases", "layers/mlp/up/kernel"))


@pytest.mark.parametrize("rule", ["lora", "biases", "lora(qa)"])
def test_a_shorthand_for_leaves_that_the_model_lacks_is_not_offered(rule):
    shapes = canonical(abstract(model_config()).shapes)
    with pytest.raises(UserError, match="matches nothing") as error:
        make_partition(shapes, rule, 3)
    offered = str(error.value).partition("matches nothing")[2]
    assert "lora" not in offered and "biases" not in offered and "norms" in offered


def test_a_step_time_is_compared_with_stages_that_train_all_on_batches_of_the_same_shape():
    rows = [
        {"stage": name, "step_seconds": seconds} for name, seconds in zip("abcd", (0.1, 0.3, 0.05, 0.7), strict=True)
    ]
    rows.append({"stage": "init"})
    shapes = {"a": (8, 256), "b": (8, 256), "c": (8, 256), "d": (8, 512)}
    timed = with_full_step_seconds(rows, shapes, full={"a", "b"})
    assert [row["full_step_seconds"] for row in timed] == [0.2, 0.2, 0.2, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compute", "int8", "nf4"])
@pytest.mark.parametrize("rules", [["lora", "head/.*"], ["layers[1]/attention/value/bias", "head/.*"]], ids=str)
def test_the_formula_counts_the_products_over_a_frozen_base_that_is_stored_low(kind, rules):
    config = model_config(scan_unroll=3, adapters=LORA, **ALL_LEAVES)
    found = make_partition(canonical(abstract(config).shapes), rules, config.layers)
    cut, objective, mesh = abstract(config, found.segments), load_plugin(objectives, "classify"), mesh_of(1)
    trainable, rest = found.divide(cut.shapes)
    shardings = found.divide(tree_shardings(mesh, cut.shapes, cut.axes))[1]
    stored = make_storage(rest, shardings, kind, "float32").abstract

    @jit
    @jax.value_and_grad
    def gradient(trainable, stored, batch):
        return objective.loss(nnx.merge(cut.graph, trainable, stored), batch, jax.random.key(0), TASK).loss

    whole_numbers = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = Batch(*[whole_numbers] * 4, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    counted = product_flops(gradient.lower(trainable, shapes, batch).compile().as_text())
    assert sum(step_flops(config, BATCH, LENGTH, "task", found.segments, found.trainable)) == counted


@pytest.mark.parametrize("kind", ["float32", "compute", "nf4"])
def test_plan_counts_the_bytes_of_a_leaf_as_the_step_holds_it(kind):
    model, mesh = model_config(compute_dtype="bfloat16"), mesh_of(1)
    stage = StageConfig("finetune", {"a": 1.0}, 5, 4, 16, start="x", train="layers(1)", frozen=kind)
    with jax.set_mesh(mesh):
        phase = build(stage, model, mesh, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
    stored = leaf_bytes(phase)
    assert stored.keys() == flatten(phase.abstract_params).keys()
    assert stored.total() == byte_report(phase.abstract_state)["param_bytes"]
    embedding = 61 * 16 * (4 if kind == "float32" else 2)
    assert (stored["embed/embedding"], stored["final_norm/scale"]) == (embedding, 16 * 4)
