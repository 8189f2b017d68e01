"""A pretrained encoder learns a domain and two tasks: all-MiniLM-L6-v2 (Wang et al. 2020, Reimers and Gurevych 2019).

    python -m llm3 run --config=configs/minilm_types.py --workdir=runs/minilm --config.data_dir=data
    python -m llm3 run --config=configs/minilm_types.py:models/all-minilm-l6-v2 --workdir=runs/minilm ...

After the colon: a folder that holds the model, instead of its name on the Hugging Face hub. `posttrain` predicts hidden
tokens of MedQuAD's answers (Ben Abacha and Demner-Fushman 2019) with the model's own mask token (Devlin et al. 2019).
The files hold no LM head for this: its transform and its bias are new, its matrix is the embedding. Evaluations of
hidden tokens leave out the rows of models whose LM head was never trained.

Then two tasks, with three seeds each: the type of question that an answer belongs to (`types`), and PubMedQA's yes, no
or maybe (Jin et al. 2019; `pubmedqa`). `direct` is `types` without post-training. The data is found as in
configs/medical.py and configs/reading.py.
"""

from ml_collections import ConfigDict

SEEDS = (0, 1, 2)
NO_LM_HEAD = ["lm_transform/.*", "lm_head/.*"]  # leaves that the files lack
UNUSED = ["pooler/.*"]  # leaves of the files that read the first token, where the heads here read the mean


def get_config(model="sentence-transformers/all-MiniLM-L6-v2"):
    """The experiment. model: a folder or a name on the hub."""
    c = ConfigDict()
    c.seed = 0
    c.model = dict(pool="mean", pooler=False, scan_unroll=6)  # all else follows from the model
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
        medquad=medquad,
        types=medquad | dict(label="question_type", max_documents=2000),
        pubmedqa=dict(
            path="qiaojin/PubMedQA",
            name="pqa_labeled",
            local="medical/pubmedqa",
            transforms=["configs.reading:flat"],
            text="{question}\n{context}",
            label="label",
            train="train[:450]",
            validation="train[450:500]",
            test="train[500:]",
        ),
    )
    c.stages = dict(
        posttrain=dict(
            kind="posttrain",
            start=dict(model=model, fresh=NO_LM_HEAD, drop=UNUSED),
            data=dict(medquad=1.0),
            objective="masked",
            steps=200,
            batch_size=16,
            sequence_length=128,
            log_every=20,
            save_every=100,
            optimizer=dict(name="adamw", learning_rate=2e-4, warmup_steps=20),
        ),
        **{f"types_{seed}": fit("types", dict(stage="posttrain", fresh=["head/.*"]), seed) for seed in SEEDS},
        **{f"pubmedqa_{seed}": fit("pubmedqa", dict(stage="posttrain", fresh=["head/.*"]), seed) for seed in SEEDS},
        **{f"direct_{seed}": direct(model, seed) for seed in SEEDS},
    )
    c.evaluations = dict(
        domain=dict(kind="masked", source="medquad", max_documents=200, sequence_length=128),
        types=dict(kind="classification", source="types", split="test", sequence_length=128),
        pubmedqa=dict(kind="classification", source="pubmedqa", split="test"),
    )
    return c


def fit(task, start, seed, **fields):
    """A task with one seed."""
    return dict(
        kind="finetune",
        start=start,
        data={task: 1.0},
        objective="classify",
        steps=dict(types=150, pubmedqa=100)[task],
        batch_size=8,
        sequence_length=128,
        log_every=20,
        save_every=200,
        seed=seed,
        optimizer=dict(name="adamw", learning_rate=2e-4, warmup_steps=15),
        **fields,
    )


def direct(model, seed):
    """The types of questions, without post-training."""
    return fit("types", dict(model=model, fresh=["head/.*", *NO_LM_HEAD], drop=UNUSED), seed, baseline=True)
