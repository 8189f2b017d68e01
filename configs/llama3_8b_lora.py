"""Llama 3.1 8B fits one task with adapters, on one or eight GPUs: fine-tuning alone is a whole run. Never trained.

    python -m llm3 plan --config=configs/llama3_8b_lora.py:h100x1 --topology=h100x1
    python -m llm3 run  --config=configs/llama3_8b_lora.py:h100x1 --workdir=runs/llama3_8b_lora

`lora` trains adapters (Hu et al. 2022) on GSM8K's worked answers, over frozen weights in bfloat16; `qlora` does so over
4 bits (Dettmers et al. 2023). Both start from the published weights of Grattafiori et al. 2024. The fields of the
model are those of its config.json, against which a run checks them; they are here so that a plan needs no model.
`--config.stages.lora.start.model=DIR` starts from a folder, for `qlora` likewise.

| variant | stage | GiB per device | tokens per second |
|---|---|--:|--:|
| `h100x1` | `lora` | 36.5 of 80 | 12k to 18k |
| `h100x1` | `qlora` | 27.2 of 80 | 11k to 18k |
| `h100x8` | `lora` | 23.5 of 80 | 80k to 146k |
| `h100x8` | `qlora` | 22.3 of 80 | 87k to 146k |

The table is the plan's estimate, between no overlap of matmuls, memory and collectives and full overlap.
"""

from ml_collections import ConfigDict

from configs.scale.llama3_8b import texts

MODEL = "meta-llama/Llama-3.1-8B"
MESHES = {"h100x1": dict(data=1), "h100x8": dict(data=1, fsdp=8)}
MICRO_BATCHES = {"h100x1": 16, "h100x8": 2}


def get_config(machine="h100x1"):
    """The experiment on one of the machines."""
    if machine not in MESHES:
        raise ValueError(f"{machine!r}: expected {', '.join(MESHES)}")
    c = ConfigDict()
    c.seed = 0
    c.model = dict(
        layers=32,
        d_model=4096,
        heads=32,
        kv_heads=8,
        d_ff=14336,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        rope_scaling=dict(
            kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
        ),
        tie_embeddings=False,
        remat="dots",
    )
    c.mesh = MESHES[machine]
    data = texts(vocab_size=128256)
    c.tokenizer = dict(vocab_size=128256)  # for a plan: a run takes the tokenizer of the model
    c.sources = {name: data["sources"][name] for name in ("general", "task")}
    c.evaluations = {name: data["evaluations"][name] for name in ("general", "task")}
    c.stages = dict(lora=stage(machine, frozen="compute"), qlora=stage(machine, frozen="nf4", baseline=True))
    return c


def stage(machine, **fields):
    """GSM8K with an adapter on every projection."""
    return dict(
        kind="finetune",
        start=dict(model=MODEL, fresh=[".*/lora/task/.*"]),
        data=dict(task=1.0),
        objective="instruct",
        train="lora",
        adapters=dict(task=dict(rank=16, alpha=32.0)),
        steps=180,
        batch_size=128,
        sequence_length=512,
        micro_batches=MICRO_BATCHES[machine],
        save_every=90,
        optimizer=dict(name="adamw", learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
        **fields,
    )
