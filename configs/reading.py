"""Answering questions: general text, then medical text with questions and answers, then reading comprehension.

    python -m llm3 run --config=configs/reading.py --workdir=runs/reading --config.data_dir=data

`pretrain` learns general text. `posttrain` learns MedQuAD's answers (Ben Abacha and Demner-Fushman 2019), as running
text and as answers to their questions, with 5 % of general text replayed. `finetune` learns PubMedQA (Jin et al. 2019):
an abstract and a question, answered by yes, no or maybe. `scratch` is the same from the untrained model. Evaluations:
bits per byte, greedy answers to MedQuAD's questions compared with the reference answers (token F1, ROUGE-L), and
PubMedQA's accuracy by likelihood compared with the majority class.

With `data_dir`, rows are read from DIR/general, DIR/medical/medquad (question, answer) and DIR/medical/pubmedqa
(question, context, label); without, from the Hugging Face hub.

Expect, after 24 minutes of CPU, 3.9 GB: token F1 of MedQuAD's answers 6 % after pretraining, 25 % after post-training;
PubMedQA 55.6 % after fine-tuning, which is no better than its majority class (55.2 %).
"""

from ml_collections import ConfigDict


def flat(row):
    """A PubMedQA row of the hub with the fields of the local files: a single context, and `label`."""
    if isinstance(row["context"], dict):
        row = row | {"context": "\n".join(row["context"]["contexts"]), "label": row["final_decision"]}
    return row


def get_config():
    """The experiment."""
    c = ConfigDict()
    c.seed = 0
    c.model = dict(layers=4, d_model=128, heads=4, d_ff=352, qk_norm="head", scan_unroll=4)
    c.tokenizer = dict(vocab_size=4096, sources=["general", "medquad"])
    c.sources = sources()
    shape = dict(batch_size=16, sequence_length=256, save_every=250, log_every=50)
    muon = dict(name="muon", learning_rate=0.02, warmup_steps=20, options=dict(adam_learning_rate=5e-3))
    fit = dict(
        kind="finetune",
        data=dict(pubmedqa=1.0),
        objective="instruct",
        steps=60,
        batch_size=8,
        sequence_length=640,
        log_every=10,
        save_every=60,
        optimizer=dict(name="adamw", learning_rate=5e-4, warmup_steps=10),
    )
    c.stages = dict(
        pretrain=dict(kind="pretrain", data=dict(general=1.0), steps=700, optimizer=muon, **shape),
        posttrain=dict(
            kind="posttrain",
            start="pretrain",
            data=dict(medquad=0.5, questions=0.5),
            replay=0.05,
            objective="instruct",
            steps=700,
            optimizer=muon,
            **shape,
        ),
        finetune=dict(start="posttrain", **fit),
        scratch=dict(start="init", baseline=True, **fit),
    )
    c.evaluations = evaluations()
    return c


def sources():
    """General text, medical answers with and without their questions, and the reading comprehension."""
    medquad = dict(
        path="lavita/MedQuAD",
        local="medical/medquad",
        bad_rows=0.7,  # the hub's copy lacks copyrighted answers
        train="train[:90%]",
        validation="train[90%:95%]",
        test="train[95%:]",
    )
    return dict(
        general=dict(
            path="Salesforce/wikitext",
            name="wikitext-103-raw-v1",
            local="general",
            bad_rows=0.5,  # the hub has one row per line, many of them empty
            max_documents=100_000,
        ),
        medquad=medquad | dict(text="answer"),
        questions=medquad | dict(prompt="Question: {question}\nAnswer:", answer=" {answer}"),
        pubmedqa=dict(
            path="qiaojin/PubMedQA",
            name="pqa_labeled",
            local="medical/pubmedqa",
            transforms=["configs.reading:flat"],
            prompt="{context}\nQuestion: {question}\nAnswer: ",
            choices=["yes", "no", "maybe"],
            answer="label",
            train="train[:450]",
            validation="train[450:500]",
            test="train[500:]",
        ),
    )


def evaluations():
    """Text, written answers, and choices."""
    return dict(
        general=dict(kind="perplexity", source="general", max_documents=40),
        domain=dict(kind="perplexity", source="medquad", max_documents=100),
        answers=dict(
            kind="generation",
            source="questions",
            split="test",
            max_documents=100,
            sequence_length=192,
            batch_size=20,
            options=dict(max_tokens=64),
        ),
        reading=dict(kind="choice", source="pubmedqa", split="test", sequence_length=640, batch_size=12),
    )
