"""Messages say their place once, and count in English."""

import pytest

from llm3.errors import NotWritten, UserError, counted, within


@pytest.mark.parametrize(
    ("inner", "whole"),
    [
        ("config: optimizer.learning_rate=-1: expected at least 0", "config.s.optimizer.learning_rate=-1: expected at"),
        ("optimizer.learning_rates[0]: rule 'x' matches", "config.s.optimizer.learning_rates[0]: rule 'x' matches"),
        ("share=2: expected a share", "config.s.share=2: expected a share"),
        ("train rule 'x': no such layer", "config.s: train rule 'x': no such layer"),
        ("embed/embedding: its axis", "config.s: embed/embedding: its axis"),
    ],
)
def test_an_error_inside_a_section_says_its_place_once(inner, whole):
    assert str(within("config.s", UserError(inner))).startswith(whole)
    assert isinstance(within("config.s", NotWritten(inner)), NotWritten)


def test_one_is_singular():
    assert [counted(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
