"""Llama 3 70B in three stages, on 64 H100 or on a TPU v5p-512. Planned, never trained: all figures are estimates.

    python -m llm3 plan --config=configs/scale/llama3_70b.py:h100x64 --topology=h100x64
    python -m llm3 run  --config=configs/scale/llama3_70b.py:h100x64 --workdir=runs/llama3_70b

The shape is the published one; stages and texts are those of configs/scale/llama3_8b.py. On 8 H100 its parameters and
moments alone are 98.6 GiB of each device: there, the variant has no `pretrain`, and `posttrain` and `finetune` are
adapters over the model in 4 bits (Dettmers et al. 2023) that runs/llama3_70b has pretrained elsewhere.

| variant | `--topology` | GiB of a device | tokens a second | 100G tokens |
|---|---|--:|--:|--:|
| `h100x8`, adapters alone | `h100x8` | 41.3 of 80 | 4.9k to 9.7k | not pretrained |
| `h100x64` | `h100x64` | 57.1 of 80 | 34k to 63k | 18 to 34 days |
| `v5p-512` | `v5p:8x8x4` | 53.0 of 95 | 79k to 117k | 10 to 15 days |
"""

from ml_collections import ConfigDict

from configs.scale.llama3_8b import stages, texts

MESHES = {
    "h100x8": dict(data=1, fsdp=8),
    "h100x64": dict(data=1, fsdp=64, across_hosts="fsdp"),
    "v5p-512": dict(data=4, fsdp=64),  # see llama3_8b.py on its name; 8192 / 64 is a tile of 128
}
PARENT = "runs/llama3_70b"  # the run of h100x64 or v5p-512, whose pretrain stage 8 H100 start from
MICRO_BATCHES = {"h100x8": 32, "h100x64": 4, "v5p-512": 1}  # of a window on each device


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
        logit_chunk=2048,
    )
    c.mesh = MESHES[machine]
    c.update(texts(vocab_size=128256))
    of_size = stages(256, 8192, MICRO_BATCHES[machine], learning_rate=1.5e-4)
    c.stages = of_size if machine != "h100x8" else adapters_only(of_size)
    if machine == "h100x8":
        c.tokenizer = dict(vocab_size=128256, path=f"{PARENT}/tokenizer.json")
    return c


def adapters_only(of_size):
    """What 8 H100 have room for: the pretrained model in 4 bits, an adapter for the domain, and one for the task."""
    of_size.pop("pretrain")
    rank = dict(rank=16, alpha=32.0)
    of_size["posttrain"] |= dict(
        start=dict(run=PARENT, stage="pretrain", fresh=[".*/lora/domain/.*"]),
        data=dict(domain=0.9, general=0.1),
        replay=0.0,
        train="lora",
        adapters=dict(domain=rank),
        frozen="nf4",
    )
    of_size["finetune"] |= dict(train="lora(task)", adapters=dict(domain=rank, task=rank), frozen="nf4")
    return of_size
