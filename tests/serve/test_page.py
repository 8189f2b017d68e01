"""The HTML of the page: every stage, where it comes from and how it was evaluated, and no markup but its own."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llm3.report.matrix import write_matrix
from llm3.serve import page
from llm3.serve.overview import Cell, Column, Evaluated, Node, Overview, evaluated, lineage, nearest_column, overview
from llm3.serve.stages import Served

HOSTILE = "<script>alert('\"&amp;')</script>"
DOCS = Path(__file__).parents[2] / "docs" / "serve.md"


class Found(HTMLParser):
    """The tags of a page with their attributes, and the texts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def stage(workdir: Path, name: str, parents: list[dict], **meta: Any) -> Served:
    """A served stage without a model."""
    known = {"kind": "finetune", "step": 1200, "params_digest": "abcdef012345", "cost": {"tokens": 2_000_000}}
    tokenizer = SimpleNamespace(specials={"[MASK]": 3}, need_mask=lambda: 3)
    trained: Any = SimpleNamespace(
        workdir=workdir, name=name, meta=known | {"lineage": parents} | meta, labels=["a", "b"]
    )
    trained.tokenizer = tokenizer
    nothing: Any = None
    return Served(name, trained, nothing, {}, nothing, 0)


def link(name: str, run: str = ".", **more: Any) -> dict:
    return {"run": run, "stage": name, "step": 7, "kind": "pretrain", "params_digest": "0123456789ab"} | more


@pytest.fixture
def chain(tmp_path) -> dict[str, Served]:
    """Two stages of a run: the second began with an ancestor of another run by way of one that is not served."""
    model = {"model": "org/model", "revision": "r", "family": "llama", "params_digest": "11"}
    far, gone = link("base", str(tmp_path / "far")), link("middle")
    return {
        "first": stage(tmp_path / "run", "first", [model]),
        "last": stage(tmp_path / "run", "last", [model, link("first"), far, gone]),
    }


def test_nothing_of_a_run_becomes_markup():
    column = Column(HOSTILE, ("completions", "classify"), "classify", HOSTILE, HOSTILE, (HOSTILE, "b"), HOSTILE)
    nodes = [Node("a", HOSTILE, "", HOSTILE), Node("b", HOSTILE, "a", HOSTILE, HOSTILE)]
    matrix = Evaluated(HOSTILE, [HOSTILE], [(HOSTILE, [Cell(HOSTILE, 0.5)], True)])
    found = Found(page.page_html(Overview(HOSTILE, [column], nodes, [matrix])))
    assert [each.get("src") for each in found.of("script")] == ["/static/page.js"]
    (article,) = found.of("article")
    assert [article[name] for name in ("data-name", "data-parent", "data-mask", "aria-label")] == [HOSTILE] * 4
    assert sum(text.count(HOSTILE) for text in found.texts) >= 10
    assert [each["value"] for each in found.of("input") if each.get("name") == "stage"] == [HOSTILE]
    assert not any(name.startswith("on") or name == "style" for _, attributes in found.tags for name in attributes)


def test_every_stage_has_a_column_and_a_box_and_only_what_a_stage_can_answer_is_offered(chain):
    content = overview(chain, {"first": ["completions", "score"], "last": ["classify", "completions", "score"]})
    found = Found(page.page_html(content))
    columns = {each["data-name"]: each for each in found.of("article")}
    assert [columns[name]["data-own"] for name in ("first", "last")] == ["completions", "classify"]
    assert columns["last"]["data-tasks"] == "classify completions score" and columns["last"]["data-parent"] == "first"
    assert [each["value"] for each in found.of("input") if each.get("name") == "stage"] == ["first", "last"]
    modes = [each["value"] for each in found.of("input") if each.get("name") == "mode"]
    assert modes == ["own", "completions", "classify", "score"]
    assert "finetune, step 1,200 · labels: a, b" in "".join(found.texts)


def test_the_lineage_leads_from_each_stage_through_other_runs_to_a_pretrained_model(chain):
    nodes = lineage(chain)
    parent = {each.key: each.parent for each in nodes}
    label = {each.key: each.label for each in nodes}
    last = next(each for each in nodes if each.column == "last")
    path = [last.key]
    while parent[path[-1]]:
        path.append(parent[path[-1]])
    assert [label[key] for key in path] == ["last", "middle", "far/base", "first", "model"]
    assert [each.column for each in nodes if each.column] == ["first", "last"]
    assert last.note == "finetune, step 1,200, 2.00M tokens, abcdef0"
    assert nearest_column(nodes, "last") == "first" and nearest_column(nodes, "first") == ""


def test_an_ancestor_in_another_run_that_is_served_is_its_stage(tmp_path):
    base = stage(tmp_path / "a", "base", [])
    child = stage(tmp_path / "b", "tuned", [link("base", str(tmp_path / "a"))])
    for stages in ({"a/base": base, "b/tuned": child}, {"b/tuned": child, "a/base": base}):
        nodes = lineage(stages)
        assert len(nodes) == 2 and nearest_column(nodes, "b/tuned") == "a/base"
        assert next(each for each in nodes if each.column == "a/base").note.startswith("finetune, step 1,200")


def test_the_matrix_is_that_of_the_report_and_its_file_may_be_missing_or_damaged(tmp_path):
    assert evaluated(tmp_path) is None
    rows = [
        {"stage": "one", "parent": None, "tokens": 5, "law_bits_per_byte": 2.0, "task_accuracy": None},
        {"stage": "two", "parent": "one", "tokens": 5, "law_bits_per_byte": 1.5, "task_accuracy": 0.75},
    ]
    write_matrix(tmp_path / "matrix.json", rows, [])
    found = evaluated(tmp_path)
    assert found is not None and found.heads == ["law bits/byte", "task accuracy"]
    assert [(name, [each.text for each in cells]) for name, cells, _ in found.rows] == [
        ("one", ["2.000", "-"]),
        ("two", ["1.500 (-0.500)", "75.0 %"]),
    ]
    assert [cells[0].shade for _, cells, _ in found.rows] == [0, 1] and found.rows[0][1][1].shade is None
    for damage in ("{", "[]", '{"rows": [3], "baselines": []}', '{"rows": [{}], "baselines": []}'):
        (tmp_path / "matrix.json").write_text(damage)
        assert evaluated(tmp_path) is None


def test_the_page_and_its_files_are_all_that_its_routes_read(chain):
    tasks = {name: ["completions"] for name in chain}
    service: Any = SimpleNamespace(stages=chain, tasks=tasks)
    client = TestClient(Starlette(routes=page.routes(service)))
    shown = client.get("/")
    assert shown.status_code == 200 and shown.headers["content-security-policy"].startswith("default-src 'none'; ")
    named = {each["src"] for each in Found(shown.text).of("script")} | {
        each["href"] for each in Found(shown.text).of("link") if each["rel"] == "stylesheet"
    }
    files = {f"/static/{file.name}" for file in page.STATIC.iterdir()}
    assert named <= files and all(client.get(file).status_code == 200 for file in files)
    assert "--vermillion:" in client.get("/static/page.css").text  # the colours of the report
    for path in ("/static/", "/static/page.py", "/static/../page.py", "/static/%2e%2e/page.py", "/static//etc/passwd"):
        assert client.get(path).status_code == 404


def test_each_level_of_surprise_and_of_change_has_a_colour_and_a_place_in_the_legend():
    script, style = ((page.STATIC / name).read_text() for name in ("tokens.js", "page.css"))
    limits = dict(re.findall(r"(SURPRISE|CHANGE) = \[(.*?)\]", script))
    for name, letter, legend, plain in (("SURPRISE", "s", page.SURPRISE, 0), ("CHANGE", "c", page.CHANGE, 3)):
        assert len(legend) == len(limits[name].split(",")) + 1
        coloured = set(re.findall(rf"^\.{letter}(\d) ", style, re.MULTILINE))
        assert coloured == {str(level) for level in range(len(legend)) if level != plain}


def test_the_keys_of_the_address_are_documented():
    script = (page.STATIC / "state.js").read_text()
    lists = re.findall(r"^const (?:TEXTS|LISTS) = \[(.*)\]$", script, re.MULTILINE)
    keys = [key for each in lists for key in re.findall(r'"(\w+)"', each)]
    assert len(keys) == 11 and keys == re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)
