"""Writes what is computed in the documentation: docs/config.md, and the sum of lines in the README.

    python docs/make.py

docs/config.md has every field of a config with type, default and meaning. The meaning is the comment at the end of the
field's line, or the comment above it. Tests in tests/docs fail if the documentation is out of date.
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import textwrap
import typing
from collections.abc import Iterator
from types import ModuleType

from llm3 import evals, objectives
from llm3.ablation.schema import AblationConfig
from llm3.config.changes import Class, field_class
from llm3.config.schema import RunConfig
from llm3.registry import load_plugin, plugin_names

ROOT = pathlib.Path(__file__).parents[1]
CONFIG, README = ROOT / "docs" / "config.md", ROOT / "README.md"
HEAD = """# Every field of a config

Made by `python docs/make.py` from [llm3/config](../llm3/config); do not edit it by hand. A field is set in the
config file, or on the command line by its path:

```bash
python -m llm3 run --config=configs/quickstart.py --workdir=runs/short --config.stages.pretrain.steps=50
```

A misspelt field is an error that names the nearest right one.

*(free)* stands after fields that may change whenever a run [resumes](stages.md#changing-a-run), *(amend)* after those
that `--amend` changes from there on. All others belong to the stage.
"""

MARKS = {"free": " *(free)*", "amendable": " *(amend)*", "fixed": ""}


class Field(typing.NamedTuple):
    """One row of a table; default: "" where the field is required."""

    name: str
    kind: str
    default: str
    meaning: str


def fields(section: type) -> list[Field]:
    """The fields of a dataclass, read from its source. Raises ValueError for one without a comment."""
    source = textwrap.dedent(inspect.getsource(section))
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            default = "" if node.value is None else _default(node.value, inspect.getmodule(section))
            found.append(Field(node.target.id, ast.unparse(node.annotation), default, _meaning(lines, node)))
    if silent := [each.name for each in found if not each.meaning]:
        raise ValueError(f"{section.__name__}: no comment says what {', '.join(silent)} mean")
    return found


def _default(value: ast.expr, module: ModuleType | None) -> str:
    """The default as written, the value of a constant of the module, or what a default_factory makes."""
    if isinstance(value, ast.Name):
        return repr(getattr(module, value.id))
    if isinstance(value, ast.Call):
        made = ast.unparse(value.keywords[0].value)
        if made.startswith("lambda: "):
            return made.removeprefix("lambda: ")
        return {"dict": "{}", "list": "[]"}.get(made, "its defaults")
    return ast.unparse(value)


def _meaning(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment at the end of the field's line, else the comment lines right above it."""
    tail = lines[node.end_lineno - 1][node.end_col_offset :].strip()
    if tail.startswith("#"):
        return tail.lstrip("# ")
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)


def sections(section: type, path: str, own: Class = "fixed") -> Iterator[tuple[str, type, Class]]:
    """(dotted path, dataclass, class of its fields that name none) of a section and of all sections below it."""
    yield path, section, own
    for name, kind in typing.get_type_hints(section).items():
        named = typing.get_origin(kind) is dict
        for inner in typing.get_args(kind) or (kind,):  # the values of a dict, or a section that may be None
            if dataclasses.is_dataclass(inner):
                inner_path = f"{path}.{name}" + (".NAME" if named else "")
                yield from sections(inner, inner_path, field_class(section, name, own))


def table(rows: list[Field]) -> str:
    """A Markdown table."""
    code = lambda text: f"`{text}`".replace("|", "\\|")  # noqa: E731
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for each in rows:
        meaning = each.meaning.replace("|", "\\|")
        lines.append(f"| {code(each.name)} | {code(each.kind)} | {code(each.default or 'required')} | {meaning} |")
    return "\n".join(lines)


def options(folder: ModuleType, what: str) -> Iterator[str]:
    """A section for each plugin of a folder that has options."""
    for name in plugin_names(folder):
        if chosen := getattr(load_plugin(folder, name), "Options", None):
            kind = lambda each: getattr(each.type, "__name__", each.type)  # noqa: E731
            rows = [f"| `{each.name}` | `{kind(each)}` | `{each.default!r}` |" for each in dataclasses.fields(chosen)]
            head = "| option | type | default |\n|---|---|---|"
            yield f"## {what} {name}\n\n{inspect.getdoc(chosen)}\n\n{head}\n" + "\n".join(rows) + "\n"


def reference() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    for path, section, own in sections(RunConfig, "config"):
        rows = [
            each._replace(meaning=each.meaning + MARKS[field_class(section, each.name, own)])
            for each in fields(section)
        ]
        parts.append(f"## {path}\n\n{inspect.getdoc(section)}\n\n{table(rows)}\n")
    for path, section, _ in sections(AblationConfig, "config of an ablation"):
        parts.append(f"## {path}\n\n{inspect.getdoc(section)}\n\n{table(fields(section))}\n")
    parts += options(objectives, "Options of the objective")
    parts += options(evals, "Options of the evaluation")
    return "\n".join(parts)


def files_to_read_first(readme: str) -> list[pathlib.Path]:
    """The files that the README says to read first."""
    return [ROOT / name for name in re.findall(r"\((llm3/.*?\.py)\)", readme.partition("## Read first\n")[2] or readme)]


def with_line_count(readme: str) -> str:
    """The README with the right sum of lines of the files to read first."""
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files_to_read_first(readme))
    return re.sub(r"together [\d,]+ lines", f"together {lines:,} lines", readme)


if __name__ == "__main__":
    CONFIG.write_text(reference(), encoding="utf-8")
    README.write_text(with_line_count(README.read_text(encoding="utf-8")), encoding="utf-8")
