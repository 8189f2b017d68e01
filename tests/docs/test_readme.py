"""README and docs: links resolve, commands parse, the config loads, the sum of lines to read first is right."""

import pathlib
import re
import runpy
import shlex

import pytest

from llm3.__main__ import parser
from llm3.ablation.load import load_ablation
from llm3.cli.verbs import VERBS
from llm3.config.load import load, read, values
from llm3.stages.origin import STAND_IN

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def section(title: str) -> str:
    """The text of a section of the README."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of each line of a page's shell blocks, without comments and leading VARIABLE=VALUE."""
    lines = (shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines())
    return [words[sum(re.fullmatch(r"[A-Z]+=.*", word) is not None for word in words) :] for words in lines if words]


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_170_lines():
    assert len(README.splitlines()) <= 170


def test_the_sum_of_the_files_to_read_first_is_that_of_the_readme():
    make = runpy.run_path(str(ROOT / "docs" / "make.py"))
    files = make["files_to_read_first"](section("Read first"))
    lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files)
    assert len(files) == 10
    assert lines <= 1800
    assert f"together {lines:,} lines" in section("Read first"), "run `python docs/make.py`"
    assert make["with_line_count"](README) == README


def test_every_room_and_verb_is_in_its_table():
    rooms = {file.parent.name for file in (ROOT / "llm3").glob("*/__init__.py")}
    assert rooms == {name for name in re.findall(r"`(\w+)/`", section("The rooms")) if name != "llm3"}
    assert set(VERBS) == set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (`.*?) \|", section("Verbs"), re.M))))


def test_the_config_of_the_readme_loads(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(blocks(ROOT / "README.md", "python")[0], encoding="utf-8")
    config = load(str(file))
    assert list(config.stages) == ["pretrain", "posttrain", "finetune"]


@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\((?!https?:)(.*?)\)", page.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_commands_name_scripts_flags_and_config_fields_that_exist(page):
    for words in commands(page):
        if "llm3" in words or any(word.endswith("local.sh") for word in words):
            if "llm3" not in words:
                words = words[words.index("-n") + 1 :]
            arguments = words[words.index("llm3") + 1 if "llm3" in words else 1 :]
            overrides = [word.removeprefix("--config.") for word in arguments if word.startswith("--config.")]
            args = parser().parse_args([word for word in arguments if not word.startswith("--config.")])
            file = getattr(args, "config", None)
            if args.verb == "ablate":
                load_ablation(file, overrides)
            elif file and file != "my_config.py":  # which `init` writes
                given = {"tokenizer": {}} | values(file, overrides)
                read(given | {"model": STAND_IN | given["model"]})  # the model may be in files that are not here
        for word in words:
            if re.fullmatch(r"(launch|docs|tests)/[\w/.]+", word):
                assert (ROOT / word).exists(), word
