"""The verb `init`: a config for the files of a user, with all that can be seen in them filled in."""

import shlex
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from llm3.cli.init import columns, sizes
from llm3.cli.init.files import Look, counted_rows, look_at
from llm3.cli.init.template import Plan, Role, config_text
from llm3.data.formats import columns_of
from llm3.errors import UserError, counted, nearest, writing
from llm3.files import write_atomic
from llm3.report.units import bytes_text

TEMPLATES = {  # name -> the flags that it needs
    "pretrain": ("general",),
    "domain": ("general", "domain"),
    "classify": ("task",),
    "chat": ("task",),
}


class Seen(NamedTuple):
    """A source as the config names it. specs: columns, or templates over columns, that hold its texts."""

    look: Look
    fields: dict
    specs: list[str]
    said: str

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the rows that were looked at."""
        return columns.text_bytes(self.look.rows, self.specs)

    @property
    def size(self) -> str:
        """The rows and the text that were looked at."""
        return f"{counted_rows(self.look)} with {bytes_text(self.text_bytes)} of text"


def init(
    template: str = "",
    general: str | None = None,
    domain: str | None = None,
    task: str | None = None,
    label: str = "",
    text: str = "",
    out: Path = Path("my_config.py"),
) -> int:
    """Look at files, write a config for them to `out`, and print what was seen and the next command.

    template: one of TEMPLATES; "": as the files suggest. label, text: columns of `task`. Raises UserError.
    """
    given = {name: value for name, value in (("general", general), ("domain", domain), ("task", task)) if value}
    check(template, given, out)
    seen = {name: _plain(value, f"--{name}") for name, value in given.items() if name != "task"}
    if task:
        look = look_at(task, "--task")
        template = template or ("classify" if _is_classified(look, label) else "chat")
        seen["task"] = _classified(look, label, text) if template == "classify" else _answered(look)
    else:
        template = template or ("domain" if domain else "pretrain")
    if set(seen) == {"task"} and template == "chat":
        raise UserError("--general: a chat model first learns from running text: name a file, or builtin:python")
    plan = _plan(template, seen, out)
    for name, each in seen.items():
        _say(f"{name:<9}{given[name]}: {each.size}; {each.said}")
    made = config_text(plan)
    with writing(out):
        write_atomic(out, made)
    print()
    _say(f"{out} is written: {_described(plan)}.")
    print(f"Next: python -m llm3 data --config={shlex.quote(str(out))}")
    return 0


def _say(line: str) -> None:
    """Print a line, broken between words where the terminal is narrower."""
    print(textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * 9))


def check(template: str, given: dict[str, str], out: Path) -> None:
    """Raise UserError for flags that do not fit together, and for a config that exists."""
    if template and template not in TEMPLATES:
        raise UserError(f"--template={template}: {nearest(template, TEMPLATES)}")
    if not given:
        raise UserError("init: expected files, as --general=FILE, --domain=FILE or --task=FILE")
    for name in TEMPLATES.get(template, ("general",) if set(given) == {"domain"} else ()):
        if name not in given:
            raise UserError(f"init --template={template or 'domain'}: expected --{name}=FILE or FOLDER as well")
    if "task" in given and template in ("pretrain", "domain"):
        raise UserError(f"--task={given['task']}: belongs to --template=classify or chat, not to {template}")
    if out.exists():
        raise UserError(f"--out={out} exists: name another file, or move this one; nothing was changed")
    if out.suffix != ".py":
        raise UserError(f"--out={out}: expected a file that ends in .py")


def _plain(value: str, flag: str) -> Seen:
    """Running text: only its column has to be found."""
    look = look_at(value, flag)
    column = columns.text_column(look.rows, "", flag, only_said=True)
    return _seen(look, {} if column == "text" else {"text": column}, [column], f"text in {column!r}")


def _is_classified(look: Look, label: str) -> bool:
    """Whether rows look like a classification and not like questions with answers."""
    return bool(label) or not (columns.messages_column(look.rows) or all(columns.question_and_answer(look.rows)))


def _classified(look: Look, label: str, text: str) -> Seen:
    found = columns.label_column(look.rows, label, "--task")
    column = columns.text_column(look.rows, text, "--task", without=[found.name])
    fields = ({} if column == "text" else {"text": column}) | {"label": found.name}
    others = [each for each in columns.names_of(look.rows) if each not in (*columns_of(column), found.name)]
    unused = f"; not used: {', '.join(others)} (--text and --label choose others)" if others else ""
    return _seen(look, fields, [column], f"text in {column!r}, {found.number} classes in {found.name!r}{unused}")


def _answered(look: Look) -> Seen:
    if turns := columns.messages_column(look.rows):
        return _seen(look, {"messages": turns}, [turns], f"conversations in {turns!r}")
    prompt, answer = columns.question_and_answer(look.rows)
    if not (prompt and answer):
        raise UserError(
            f"--task: no conversations, and no columns with questions and answers; expected `messages`, or names such "
            f"as prompt and answer (columns: {', '.join(columns.names_of(look.rows))})"
        )
    if prompt.lower() == "instruction" and all(isinstance(row.get("input"), str) for row in look.rows):
        prompt = "{instruction}\n{input}"
    said = f"questions in {prompt!r}, answers in {answer!r}"
    return _seen(look, {"prompt": prompt, "answer": answer}, [prompt, answer], said)


def _seen(look: Look, fields: dict, specs: list[str], said: str) -> Seen:
    """A source with its held-out rows: those of a validation file, or a share of the rows."""
    if "validation" not in look.splits:
        fields = fields | {"validation": "", "validation_share": sizes.share_for(len(look.rows))}
    return Seen(look, look.fields | fields, specs, said)


def _plan(template: str, seen: dict[str, Seen], out: Path) -> Plan:
    corpora = [name for name in seen if name != "task"] or ["task"]
    amounts = {name: each.text_bytes for name, each in seen.items()}
    chosen = sizes.sizes_for(sum(amounts[name] for name in corpora), has_accelerator())
    per_step = chosen.batch_size * chosen.sequence_length
    steps = {"pretrain": sizes.steps_for(amounts[corpora[0]], 6, per_step, chosen.most_steps)}
    if "domain" in corpora[1:]:
        steps["posttrain"] = sizes.steps_for(amounts["domain"], 6, per_step, chosen.most_steps)
    window = 0
    if "task" in seen:
        own = seen["task"]
        window = sizes.window_for([columns.text_bytes([row], own.specs) for row in own.look.rows[:5000]], 512)
        most = chosen.most_steps if template == "chat" else chosen.most_steps // 2
        steps["finetune"] = sizes.steps_for(amounts["task"], 12, chosen.batch_size * window, most)
    roles = {name: Role(each.size, each.fields, "test" in each.look.splits) for name, each in seen.items()}
    held_out = {name: int(each.fields.get("validation_share", 1) * len(each.look.rows)) for name, each in seen.items()}
    return Plan(template, str(out), f"runs/{out.stem}", roles, chosen, steps, window, held_out)


def has_accelerator() -> bool:
    """Whether jax finds more than CPUs here."""
    import jax

    return jax.default_backend() != "cpu"


def _described(plan: Plan) -> str:
    model = plan.sizes.model
    stages = ", ".join(f"{name} for {counted(steps, 'step')}" for name, steps in plan.steps.items())
    return f"{model['layers']} layers of width {model['d_model']}, {plan.sizes.vocab_size:,} tokens; {stages}"
