"""The text of a config for the files of a user."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llm3.cli.init.sizes import Sizes

WIDTH = 120  # of a line
HEAD = '''"""{title}

    python -m llm3 run --config={out} --workdir={workdir}

{seen}
Paths are relative to the directory in which the command runs. docs/config.md has every field.
"""

from ml_collections import ConfigDict

'''
CHAT = """# each turn is its role, its content and, after an answer, the end token
CHAT = (
    "{% for m in messages %}{{ m.role }}:\\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\\n{% endif %}"
)

"""
TITLES = {
    "pretrain": "A language model from scratch on {general}.",
    "domain": "General text ({general}), then the domain ({domain}).",
    "classify": "Text, then a classifier of {task}.",
    "chat": "Text, then answers as in {task}.",
}
MUON = 'dict(name="muon", learning_rate=0.02, warmup_steps={warmup}, options=dict(adam_learning_rate=5e-3))'


class Role(NamedTuple):
    """What a config says of a source, and what was seen in its files.

    note: what was seen. fields: of the source. rows: how many there are to train on.
    """

    note: str
    fields: dict[str, Any]
    has_test: bool = False


class Plan(NamedTuple):
    """All that a config is written from. steps: {stage: steps}. window: tokens of a window of the task."""

    template: str
    out: str
    workdir: str
    roles: dict[str, Role]
    sizes: Sizes
    steps: dict[str, int]
    window: int
    held_out: dict[str, int]  # about how many rows of each source are for evaluation


def config_text(plan: Plan) -> str:
    """A config file that runs as it is."""
    paths = {name: role.fields.get("data_files") or role.fields["path"] for name, role in plan.roles.items()}
    named = {name: str(each.get("train") if isinstance(each, dict) else each) for name, each in paths.items()}
    title = TITLES[plan.template].format(**{"general": "text", "domain": "text"} | named)
    # a docstring that no path can end
    seen = "\n".join(f"{name}: {role.note}" for name, role in plan.roles.items())
    title, seen = (text.replace("\\", "/").replace('"', "'") for text in (title, seen))
    lines = [HEAD.format(title=title, seen=seen, out=plan.out, workdir=plan.workdir)]
    lines += [CHAT] * (plan.template == "chat")
    lines.append("\ndef get_config():\n    c = ConfigDict()\n")
    template = ", chat_template=CHAT" if plan.template == "chat" else ""
    corpora = [name for name in plan.roles if name != "task"] or ["task"]
    lines += [
        f"    c.model = {_call(plan.sizes.model | _pooling(plan))}\n",
        f"    c.tokenizer = dict(vocab_size={plan.sizes.vocab_size}, sources={_list(corpora)}{template})\n",
        "    c.sources = dict(\n",
        *(line for name, role in plan.roles.items() for line in _source(name, role)),
        "    )\n",
        *_stages(plan, corpora),
        *_evaluations(plan, corpora),
        "    return c\n",
    ]
    return "".join(lines)


def _source(name: str, role: Role) -> list[str]:
    line = f"        {name}={_call(role.fields)},\n"
    if len(line) > WIDTH + 1:  # with its line end
        inner = _call(role.fields).removeprefix("dict(").removesuffix(")")
        line = f"        {name}=dict(\n            {inner}\n        ),\n"
        if len(inner) > WIDTH - 12:
            inner = "".join(f"            {key}={_value(value)},\n" for key, value in role.fields.items())
            line = f"        {name}=dict(\n{inner}        ),\n"
    return [line]


def _pooling(plan: Plan) -> dict[str, Any]:
    return {"pool": "mean"} if plan.template == "classify" else {}


def _stages(plan: Plan, corpora: list[str]) -> list[str]:
    sizes, first = plan.sizes, corpora[0]
    warmup = max(5, plan.steps["pretrain"] // 20)
    shape = f'objective="causal", batch_size={sizes.batch_size}, sequence_length={sizes.sequence_length}'
    lines = [
        f"    muon = {MUON.format(warmup=warmup)}\n",
        f"    text = dict({shape}, optimizer=muon)\n",
        *_fit(plan),
        "    c.stages = dict(\n",
        f'        pretrain=dict(kind="pretrain", data=dict({first}=1.0), steps={plan.steps["pretrain"]}, **text),\n',
    ]
    parent = "pretrain"
    if "domain" in corpora[1:]:
        data = f"dict(domain=0.9, {first}=0.1)"
        own = f'kind="posttrain", start="pretrain", data={data}, steps={plan.steps["posttrain"]}, **text'
        lines += [
            "        # a tenth of general text, so that it is not forgotten\n",
            f"        posttrain=dict({own}),\n",
        ]
        parent = "posttrain"
    if "task" in plan.roles:
        lines += _task(plan, parent)
    return [*lines, "    )\n"]


def _fit(plan: Plan) -> list[str]:
    """What the last stage has besides its parent and its data."""
    if "task" not in plan.roles:
        return []
    objective = "classify" if plan.template == "classify" else "instruct"
    shape = f"steps={plan.steps['finetune']}, batch_size={plan.sizes.batch_size}, sequence_length={plan.window}"
    return [
        '    adamw = dict(name="adamw", learning_rate=2e-3, warmup_steps=10)\n',
        f'    fit = dict(objective="{objective}", {shape}, optimizer=adamw)\n',
    ]


def _task(plan: Plan, parent: str) -> list[str]:
    classify = plan.template == "classify"
    start = f'dict(stage="{parent}", fresh=["head/.*"])' if classify else f'"{parent}"'
    return [
        *["        # the head is new\n"] * classify,
        f'        finetune=dict(kind="finetune", start={start}, data=dict(task=1.0), **fit),\n',
    ]


def _evaluations(plan: Plan, corpora: list[str]) -> list[str]:
    lines = ["    c.evaluations = dict(  # after each stage, on rows that are held out\n"]
    for name in corpora:
        sample = ", max_documents=200" if plan.held_out[name] > 200 else ""
        lines.append(f'        {name}=dict(kind="perplexity", source="{name}"{sample}),\n' * (name != "task"))
    if "task" in plan.roles:
        split = ', split="test"' if plan.roles["task"].has_test else ""
        own = f'source="task"{split}, sequence_length={plan.window}'
        if plan.template == "classify":
            lines.append(f'        task=dict(kind="classification", {own}),\n')
        else:
            answers = f"max_documents=20, options=dict(max_tokens={min(64, plan.window // 2)})"
            lines.append(f'        task=dict(kind="generation", {own}, {answers}),\n')
    return [*lines, "    )\n"]


def _call(fields: Mapping[str, Any]) -> str:
    return f"dict({', '.join(f'{name}={_value(value)}' for name, value in fields.items())})"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return _call(value)
    return _list(value) if isinstance(value, list) else _quoted(value) if isinstance(value, str) else repr(value)


def _list(values: list[str]) -> str:
    return f"[{', '.join(map(_quoted, values))}]"


def _quoted(text: str) -> str:
    """A Python string in double quotes, as the formatter writes it."""
    return repr(text) if '"' in text else f'"{repr(text)[1:-1]}"' if "'" not in text else repr(text)
