"""A pretrained model learns a domain and a task: SmolLM2-135M-Instruct (Ben Allal et al. 2025), on medical text.

    python -m llm3 run --config=configs/smollm2_medical.py --workdir=runs/smollm2 --config.data_dir=data
    python -m llm3 run --config=configs/smollm2_medical.py:models/smollm2-135m-instruct --workdir=runs/smollm2 ...

After the colon: a folder that holds the model, instead of its name on the Hugging Face hub. `--stages=lora,top4` only
post-trains. Nothing is pretrained here: the first row of the table, `start`, is the model as it came.

`lora` and `top4` post-train it on MedQuAD's answers (Ben Abacha and Demner-Fushman 2019) with 5 % of general text: with
low-rank adapters (Hu et al. 2022), or the top 4 of its 30 layers. Then, from `top4`, four methods fit the type of
question that an answer belongs to: `types_full`, `types_top4`, `types_lora`, and `types_qlora` over a frozen model in 4
bits (Dettmers et al. 2023). `types_direct` is `types_lora` without post-training. The data is found as in
configs/medical.py.
"""

from ml_collections import ConfigDict

ADAPTER = dict(types=dict(rank=8))
TYPES = dict(
    types_full=dict(train="all", learning_rate=5e-5),
    types_top4=dict(train="top(4)", learning_rate=2e-4),
    types_lora=dict(train=["lora", "head/.*"], adapters=ADAPTER, learning_rate=1e-3),
    types_qlora=dict(train=["lora", "head/.*"], adapters=ADAPTER, learning_rate=1e-3, frozen="nf4"),
)


def get_config(model="HuggingFaceTB/SmolLM2-135M-Instruct"):
    """The experiment. model: a folder or a name on the hub."""
    c = ConfigDict()
    c.seed = 0
    c.model = dict(pool="mean")  # all else follows from the model
    medquad = dict(
        path="lavita/MedQuAD",
        local="medical/medquad",
        text="answer",
        bad_rows=0.7,  # the hub's copy lacks copyrighted answers
        train="train[:90%]",
        validation="train[90%:95%]",
        test="train[95%:]",
    )
    c.sources = dict(
        general=dict(
            path="Salesforce/wikitext",
            name="wikitext-103-raw-v1",
            local="general",
            bad_rows=0.5,  # the hub has one row per line, many of them empty
            max_documents=100_000,
        ),
        medquad=medquad,
        task=medquad | dict(label="question_type", max_documents=2000),
    )
    domain = dict(
        kind="posttrain",
        data=dict(medquad=0.95, general=0.05),
        steps=100,
        batch_size=4,
        sequence_length=256,
        log_every=10,
        save_every=50,
    )
    c.stages = dict(
        lora=dict(
            start=dict(model=model, fresh=[".*/lora/medical/.*"]),
            train="lora",
            adapters=dict(medical=dict(rank=16)),
            baseline=True,
            optimizer=dict(name="adamw", learning_rate=5e-4, warmup_steps=10),
            **domain,
        ),
        top4=dict(
            start=dict(model=model),
            train="top(4)",
            optimizer=dict(name="adamw", learning_rate=2e-4, warmup_steps=10),
            **domain,
        ),
        **{name: types(dict(stage="top4"), **method) for name, method in TYPES.items()},
        types_direct=types(dict(model=model), baseline=True, **TYPES["types_lora"]),
    )
    c.evaluations = dict(
        general=dict(kind="perplexity", source="general", max_documents=8),
        domain=dict(kind="perplexity", source="medquad", max_documents=40),
        task=dict(kind="classification", source="task", split="test", max_documents=200, sequence_length=128),
    )
    return c


def types(start, learning_rate, **method):
    """The task by one method, with a new head and new adapters."""
    new = ["head/.*", *(f".*/lora/{name}/.*" for name in method.get("adapters", ()))]
    return dict(
        kind="finetune",
        start=start | dict(fresh=new),
        data=dict(task=1.0),
        objective="classify",
        steps=60,
        batch_size=8,
        sequence_length=128,
        log_every=10,
        save_every=60,
        optimizer=dict(name="adamw", learning_rate=learning_rate, warmup_steps=6),
        **method,
    )
