"""The fields of a model that fit together, those that do not, and a model's config through JSON."""

import dataclasses
import json

import pytest

from llm3.config import load, schema
from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.config.model_schema import AdapterConfig, ModelConfig, RopeScaling, check_length, read_model
from llm3.errors import UserError
from llm3.models.batching import sample
from llm3.stages.experiment import check_without_data
from tests.helpers.tiny import model_config

LEARNED = {"positions": "learned", "max_positions": 16}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block": "prenorm"}, "model.block='prenorm': .*'pre'"),
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"attention_bias": "kv"}, "model.attention_bias='kv'"),
        ({"positions": "learned"}, r"max_positions=0: positions='learned' needs the longest window"),
        ({"max_positions": 9}, r"max_positions=9: expected it only with positions='learned'"),
        ({"position_offset": 2}, r"position_offset=2: expected it only with positions='learned'"),
        (LEARNED | {"rope_fraction": 0.5}, r"rope_fraction=0.5: expected it only with positions='rope'"),
        (LEARNED | {"no_rope_layers": (1,)}, r"no_rope_layers=\(1,\): expected it only with positions='rope'"),
        ({"rope_fraction": 1.5}, r"rope_fraction=1.5: expected a share above 0"),
        ({"rope_fraction": 0.5}, r"head_dim=6 x rope_fraction=0.5 is odd"),
        ({"rope_scaling": {"kind": "yarn"}}, r"rope_scaling.kind='yarn'"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.0}}, r"rope_scaling.factor=0.0: expected a number above 0"),
        ({"rope_scaling": {"kind": "llama3", "low_freq_factor": 4.0}}, "expected less than high_freq_factor=4.0"),
        ({"full_attention_layers": (0,)}, r"full_attention_layers=\(0,\): expected it only with a window"),
        ({"window": 4, "full_attention_layers": (3,)}, r"full_attention_layers: 3: expected layers from 0 to 2"),
        ({"no_rope_layers": (-1,)}, r"no_rope_layers: -1: expected layers from 0 to 2"),
        ({"window_rope_theta": 9.0}, "window_rope_theta=9.0: expected it only with a window"),
        ({"skip_first_norm": True, "block": "post"}, "skip_first_norm=True: expected it only with block"),
        ({"causal": False}, "pool='last' needs a causal model"),
        ({"pool": "first"}, "pool='first' needs a bidirectional model"),
        ({"attention_softcap": -1.0}, "attention_softcap=-1.0: expected at least 0"),
        ({"embedding_scale": 0.0}, "embedding_scale=0.0: expected a number above 0"),
        ({"vocab_multiple": 0}, "vocab_multiple=0: expected at least 1"),
        (
            {"gated_mlp": False, "adapters": (("x", AdapterConfig(targets=("gate",))),)},
            "adapters.x.targets: model.gated_mlp=False has no 'gate'; expected some of query",
        ),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused_in_a_line(changes, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        model_config(**changes)
    assert "\n" not in str(caught.value)


def test_a_model_with_learned_positions_has_an_odd_head_and_no_longer_window_than_its_table():
    config = model_config(**LEARNED, head_dim=5)
    check_length(config, 16, "stages.x.sequence_length")
    check_length(model_config(), 10**6, "any")
    with pytest.raises(UserError, match=r"^stages\.x\.sequence_length=17: .* at most 16 tokens"):
        check_length(config, 17, "stages.x.sequence_length")


def test_windows_longer_than_the_learned_positions_are_refused_before_data_is_read(tmp_path):
    fields = {"kind": "pretrain", "data": {"a": 1.0}, "steps": 1, "batch_size": 1}
    run = schema.RunConfig(
        model=ModelConfig(layers=1, d_model=8, heads=2, d_ff=8, **LEARNED),
        tokenizer=TokenizerConfig(vocab_size=300),
        sources={"a": SourceConfig(path="a")},
        stages={"one": schema.StageConfig(**fields, sequence_length=16)},
        evaluations={"bits": schema.EvaluationConfig("perplexity", "a", sequence_length=16)},
        mesh=schema.MeshConfig(data=1),
    )
    check_without_data(run, tmp_path, ["one"])
    longer = schema.StageConfig(**fields, sequence_length=17)
    with pytest.raises(UserError, match=r"config\.stages\.one\.sequence_length=17"):
        check_without_data(dataclasses.replace(run, stages={"one": longer}), tmp_path, ["one"])
    evaluation = {"bits": schema.EvaluationConfig("perplexity", "a", sequence_length=17)}
    with pytest.raises(UserError, match=r"config\.evaluations\.bits\.sequence_length=17"):
        check_without_data(dataclasses.replace(run, evaluations=evaluation), tmp_path, ["one"])
    with pytest.raises(UserError, match=r"prompt and max_tokens=17: .* at most 16 tokens"):
        sample({}, model_config(**LEARNED), [1] * 8, max_tokens=9)


def test_a_model_in_the_metadata_of_a_checkpoint_is_read_as_it_was():
    config = model_config(
        rope_scaling=RopeScaling("llama3", 8.0),
        window=4,
        full_attention_layers=(0, 2),
        adapters=(("x", AdapterConfig(rank=2, targets=("query",))),),
    )
    again = read_model(json.loads(json.dumps(schema.as_dict(config))))
    assert again == config and hash(again) == hash(config)
    assert isinstance(again.rope_scaling, RopeScaling) and again.full_attention_layers == (0, 2)
    assert read_model(schema.as_dict(config) | {"logit_chunk": 256}) == config  # a field of an older version
    with pytest.raises(UserError, match="a field 'windw', which this version lacks; did you mean 'window'"):
        read_model(schema.as_dict(config) | {"windw": 3})


def test_a_section_of_rotary_scaling_is_read_from_a_config_and_the_command_line(tmp_path):
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        "    model = dict(layers=2, d_model=8, heads=2, d_ff=8, rope_scaling=dict(kind='linear', factor=2))\n"
        "    stage = dict(kind='pretrain', data=dict(a=1.0), steps=1, batch_size=1, sequence_length=8)\n"
        "    sources = dict(a=dict(path='.'))\n"
        "    return ConfigDict(dict(model=model, tokenizer=dict(), sources=sources, stages=dict(pretrain=stage)))\n"
    )
    file = str(tmp_path / "config.py")
    assert load.load(file).model.rope_scaling == RopeScaling("linear", 2.0)
    changed = load.load(file, ["model.rope_scaling.factor=4.0", "model.no_rope_layers=[1]"]).model
    assert changed.rope_scaling.factor == 4.0 and changed.no_rope_layers == (1,)
    with pytest.raises(UserError, match=r"config\.model\.rope_scaling\.factr: no such field; did you mean 'factor'"):
        load.load(file, ["model.rope_scaling.factr=4.0"])


def test_every_field_of_a_model_has_the_default_of_the_plain_transformer():
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    plain = {"block": "pre", "norm": "rmsnorm", "qk_norm": "none", "positions": "rope", "activation": "silu"}
    assert plain.items() <= fields.items() and fields["window"] == 0 and fields["rope_scaling"] is None
