"""docs/config.md is made from the schema, and says what every field means."""

import dataclasses
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MAKE = runpy.run_path(str(ROOT / "docs" / "make.py"))


def test_the_reference_of_the_config_is_current():
    found = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert found == MAKE["reference"](), "run `python docs/make.py`"


def test_a_field_without_a_meaning_is_an_error():
    with pytest.raises(ValueError, match="Silent: no comment says what beta mean"):
        MAKE["fields"](Silent)


def test_a_meaning_is_the_comment_on_the_line_or_the_lines_above_it():
    assert [tuple(each) for each in MAKE["fields"](Told)] == [
        ("alpha", "int", "", "on the line"),
        ("beta", "list[str]", "[]", "above the line, over two lines"),
        ("gamma", "str", "'#'", "with a # in it"),
    ]


@dataclasses.dataclass(frozen=True)
class Silent:
    """Something."""

    alpha: int  # known

    beta: int = 0


@dataclasses.dataclass(frozen=True)
class Told:
    """Something."""

    alpha: int  # on the line
    # above the line,
    # over two lines
    beta: list[str] = dataclasses.field(default_factory=list)
    gamma: str = "#"  # with a # in it
