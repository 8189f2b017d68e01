"""Llama 3 70B in three stages, on 64 H100 or on a TPU v5p-512. Planned, never trained: all figures are estimates.

    python -m llm3 plan --config=configs/scale/llama3_70b.py:h100x64 --topology=h100x64
    python -m llm3 run  --config=configs/scale/llama3_70b.py:h100x64 --workdir=runs/llama3_70b

The model has the published shape; stages and data are the same as in configs/scale/llama3_8b.py. On 8 H100, its
parameters and moments alone would need 98.6 GiB per device. That variant has no `pretrain`; its `posttrain` and
`finetune` train adapters over a frozen model in 4 bits (Dettmers et al. 2023), pretrained elsewhere in runs/llama3_70b.

| variant | `--topology` | GiB per device | tokens per second | 100G tokens |
|---|---|--:|--:|--:|
| `h100x8`, adapters alone | `h100x8` | 19.8 of 80 | 8.5k to 11k | not pretrained |
| `h100x64` | `h100x64` | 37.1 of 80 | 49k to 67k | 17 to 23 days |
| `v5p-512` | `v5p:8x8x4` | 32.9 of 95 | 104k to 124k | 9 to 11 days |
"""

from ml_collections import ConfigDict

from configs.scale.llama3_8b import stages, texts

MESHES = {
    "h100x8": dict(data=1, fsdp=8),
    "h100x64": dict(data=1, fsdp=64, across_hosts="fsdp"),
    "v5p-512": dict(data=4, fsdp=64),  # llama3_8b.py explains the name; 8192 / 64 is a tile of 128
}
PARENT = "runs/llama3_70b"  # run of h100x64 or v5p-512; h100x8 starts from its pretrain stage
MICRO_BATCHES = {"h100x8": 32, "h100x64": 4, "v5p-512": 1}  # each micro-batch is one window per device


def get_config(machine="h100x64"):
    """The experiment on one of the machines."""
    if machine not in MESHES:
        raise ValueError(f"{machine!r}: expected {', '.join(MESHES)}")
    c = ConfigDict()
    c.seed = 0
    # Grattafiori et al. 2024, "The Llama 3 herd of models", table 3
    c.model = dict(
        layers=80,
        d_model=8192,
        heads=64,
        kv_heads=8,
        d_ff=28672,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        tie_embeddings=False,
        remat="full",
    )
    c.mesh = MESHES[machine]
    c.update(texts(vocab_size=128256))
    scaled = stages(256, 8192, MICRO_BATCHES[machine], learning_rate=1.5e-4)
    c.stages = scaled if machine != "h100x8" else adapters_only(scaled)
    if machine == "h100x8":
        c.tokenizer = dict(vocab_size=128256, path=f"{PARENT}/tokenizer.json")
    return c


def adapters_only(scaled):
    """The stages that fit 8 H100: the pretrained model in 4 bits, an adapter for the domain, and one for the task."""
    scaled.pop("pretrain")
    rank = dict(rank=16, alpha=32.0)
    scaled["posttrain"] |= dict(
        start=dict(run=PARENT, stage="pretrain", fresh=[".*/lora/domain/.*"]),
        data=dict(domain=0.9, general=0.1),
        replay=0.0,
        train="lora",
        adapters=dict(domain=rank),
        frozen="nf4",
    )
    scaled["finetune"] |= dict(train="lora(task)", adapters=dict(domain=rank, task=rank), frozen="nf4")
    return scaled
