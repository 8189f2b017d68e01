"""Extractive reading comprehension in Chinese: does pretraining on the same documents help to find answers in them?

    python -m llm3 run --config=configs/cmrc.py --workdir=runs/cmrc --config.data_dir=data

CMRC 2018 (Cui et al. 2019): an encoder is pretrained on the training questions and contexts by predicting hidden
tokens, then learns to find the start and end of an answer in a context. `scratch` learns only the second step. Exact
match and F1 follow the rules of CMRC 2018, over test questions whose contexts are not in the training data.

With `data_dir`, rows are read from DIR/reading/cmrc2018/{train,test}.jsonl (question, context, answers: {text,
answer_start}); without, from the Hugging Face hub.

Expect, after 16 minutes of CPU, 3 GB: exact match 2.0 % and F1 12.6 % after pretraining, 0.5 % and 10.4 % from scratch:
a model of this size learns little of the task. Two of the 1,002 test questions are empty and excluded. The evaluation
`contexts` has other questions, but mostly the training contexts, as the report shows.
"""

from ml_collections import ConfigDict


def get_config():
    """The experiment."""
    c = ConfigDict()
    c.seed = 0
    c.model = dict(layers=4, d_model=128, heads=4, d_ff=352, qk_norm="head", causal=False, pool="mean", scan_unroll=4)
    c.tokenizer = dict(vocab_size=4096, sources=["contexts"])
    cmrc = dict(path="hfl/cmrc2018", local="reading/cmrc2018", validation="", validation_share=0.05)
    c.sources = dict(
        contexts=cmrc | dict(text="{question}\n{context}"),
        questions=cmrc | dict(text="context", prompt="question", answers="answers"),
    )
    fit = dict(
        kind="finetune",
        data=dict(questions=1.0),
        objective="span",
        steps=300,
        batch_size=8,
        sequence_length=512,
        log_every=20,
        save_every=200,
        optimizer=dict(name="adamw", learning_rate=1e-3, warmup_steps=50),
    )
    c.stages = dict(
        pretrain=dict(
            kind="pretrain",
            data=dict(contexts=1.0),
            objective=dict(name="masked", share=0.2),
            steps=800,
            batch_size=16,
            sequence_length=256,
            log_every=50,
            save_every=200,
            optimizer=dict(name="muon", learning_rate=0.02, warmup_steps=20, options=dict(adam_learning_rate=5e-3)),
        ),
        finetune=dict(start=dict(stage="pretrain", fresh=["head/.*"]), **fit),
        scratch=dict(start="init", baseline=True, **fit),
    )
    c.evaluations = dict(
        contexts=dict(kind="masked", source="contexts", max_documents=60),
        reading=dict(
            kind="span",
            source="questions",
            split="test",
            sequence_length=512,
            batch_size=8,
            # every question has an answer; "no answer" only applies to windows of a long context without it
            options=dict(rules="cmrc2018", max_answer_tokens=100, no_answer_threshold=1e9),
        ),
    )
    return c
