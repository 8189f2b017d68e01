"""report.html: one file that loads nothing, in which data is shown and never becomes markup."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm3.report.details import text_table
from llm3.report.escape import block, escaped, marked_block
from llm3.report.html import page_html, write_page
from llm3.report.page import page
from llm3.report.plots.heat_map import plot_heat_map
from tests.helpers import tiny_report

EVIL = "<script>alert(1)</script> ![a](http://a.b/c.png) [b](javascript:x) **c** `d` | <http://e.f> &lt; # _g_"


class Reader(HTMLParser):
    """The tags of a page, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.parts, self._hidden = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("style", "title")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.parts += [data] * (not self._hidden)

    @property
    def text(self):
        return "".join(self.parts)


def of(markdown, figures=None):
    return Reader(page_html("T", markdown, figures or {}))


@given(
    st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("<>[]()!`*_|\\#&~-+.1 \n")), max_size=60)
)
@example(EVIL)
@example("1. a")
@example("- a")
@example("+")
@example("=")
@example("2) b")
def test_data_is_shown_as_it_is_in_a_paragraph_and_in_a_table(text):
    shown = " ".join(text.split()).replace("\0", "\ufffd")
    for markdown in (f"a {escaped(text)} b", f"{escaped(text)}", text_table(["h"], [[text]], longest=999)):
        found = of(f"# T\n\n{markdown}\n")
        assert shown in " ".join(found.text.split()) or not shown
        assert {tag for tag, _ in found.tags} & {
            "script",
            "img",
            "a",
            "em",
            "strong",
            "code",
            "ul",
            "ol",
            "hr",
        } == set()


@given(st.text(alphabet="`<a\n~", max_size=30))
def test_a_block_holds_whatever_it_is_given(text):
    found = of(f"{block(text)}\n\nafter")
    assert [tag for tag, _ in found.tags if tag in ("pre", "p")] == ["pre", "p"]
    assert text in found.text


def test_targets_are_marked():
    found = of(marked_block([[("prompt ", False), ("<b>answer", True)], [("«x»", False)]]))
    assert [tag for tag, _ in found.tags].count("mark") == 1
    assert "prompt <b>answer" in found.text and "\u2039x\u203a" in found.text


def test_prompts_labels_and_settings_of_a_run_never_become_markup():
    samples = {"pretrain": [{"step": 1, "prompt": EVIL, "text": EVIL}]}
    details = {"full_0": {"task_confusion": {"classes": [EVIL, "b"], "counts": [[1, 0], [0, 1]]}, EVIL: {EVIL: 1.0}}}
    material = tiny_report.material(
        title=f"Run {EVIL}",
        command=EVIL,
        samples=samples,
        details=details,
        facts={"seed": EVIL},
        settings=[f"samples = {EVIL}"],
        data_samples={"pretrain": [[(EVIL, True)]]},
    )
    figures = {"a.svg": plot_heat_map([EVIL], [EVIL], [[1.0]], [[EVIL]])}
    found = of(page(material) + "\n\n![a](figures/a.svg)\n", figures)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "iframe", "object", "base"}
    links = {attrs["href"] for tag, attrs in found.tags if tag == "a"}
    assert all(link.startswith("#") or link == "config.resolved.json" for link in links)
    assert found.text.count("<script>alert(1)</script>") >= 6


def test_a_page_refers_to_nothing_outside_itself_and_needs_no_script(tmp_path):
    write_page(tmp_path, "T", page(tiny_report.material()), {"a.svg": plot_heat_map(["a"], ["b"], [[1.0]], [["1"]])})
    text = (tmp_path / "report.html").read_text()
    for tag, attrs in Reader(text).tags:
        assert tag not in ("script", "img", "iframe") and not any(name.startswith("on") for name in attrs)
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:", "config.resolved.json"))
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_html_and_images_in_the_markdown_itself_are_text():
    found = of("# T\n\n<script>x</script>\n\na <b>c</b> ![picture](http://a.b/c.png)\n")
    assert not {tag for tag, _ in found.tags} & {"script", "b", "img"}
    assert "<script>x</script>" in found.text and "a <b>c</b> picture" in found.text


def test_contents_link_to_every_section_and_anchors_are_unique():
    found = of("# T\n\nThe verdict.\n\n## One\n\n## One\n\n### Below\n\n## & <b>\n")
    anchors = [attrs["id"] for tag, attrs in found.tags if tag == "h2"]
    assert anchors == ["one", "one-2", "b"]
    assert [attrs["href"] for tag, attrs in found.tags if tag == "a"] == [f"#{each}" for each in anchors]
    text = page_html("T", "# T\n\nThe verdict.\n\n## One\n\n## Two\n", {})
    assert text.index("The verdict.") < text.index("<nav") < text.index("<h2")


def test_a_page_is_written_with_its_figures_and_without_those_of_an_earlier_one(tmp_path):
    old, new = ({f"{name}.svg": plot_heat_map([name], ["x"], [[0.5]], [["1"]])} for name in ("old", "new"))
    write_page(tmp_path, "T", "# T\n\n![x](figures/old.svg)\n", old)
    write_page(tmp_path, "T", "# T\n\n![Two <words>](figures/new.svg)\n\n![gone](figures/old.svg)\n", new)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["new.svg"]
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 1 and 'aria-label="Two &lt;words&gt;"' in text and "gone" in text
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write_page(tmp_path, "T", "# T\n\n![Two <words>](figures/new.svg)\n\n![gone](figures/old.svg)\n", new)
    assert first == {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_page_with_too_many_figures_stays_small_and_links_the_last_ones():
    svg = plot_heat_map(["a"], ["b"], [[1.0]], [["1"]])
    figures = {f"{at}.svg": svg.replace(">1<", f">{'x' * 150_000}<") for at in range(8)}
    text = page_html("T", "".join(f"![Figure {at}](figures/{at}.svg)\n\n" for at in range(8)), figures)
    assert len(text) < 1_000_000 and text.count("<svg") == 5
    assert text.index("<svg") < text.index('<a href="figures/5.svg">Figure 5</a>') < text.index("figures/7.svg")


@pytest.mark.parametrize("title", ["A & B", "</title><script>"])
def test_the_title_is_text(title):
    assert "<title>" + title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page_html(title, "", {})
