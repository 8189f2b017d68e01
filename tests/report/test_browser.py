"""report.html in a real browser: headless Chromium, driven by Playwright."""

import itertools

import pytest

from llm3.ablation.analysis import Analysis
from llm3.ablation.report import page as ablation_page
from llm3.report.html import write_page
from llm3.report.page import write_report
from llm3.report.side_by_side import page, title
from tests.helpers.browsers import chromium, heard
from tests.helpers.tiny_report import everything
from tests.helpers.tiny_study import in_grid, many
from tests.report.test_side_by_side import run

pytestmark = pytest.mark.slow
NAMES = ("run", "runs", "ablation", "grid")
WIDTHS, SCHEMES = (400, 1400), ("light", "dark")
SECTIONS = (
    "Stages and evaluations",
    "The stages compared",
    "Over seeds",
    "Forgetting",
    "Quality against cost",
    "Training",
    "Confusion and calibration",
    "The most confident errors",
    "Samples",
    "Training data",
    "Lineage",
    "Resources",
    "How to reproduce it",
    "Config",
)

# The contrast (WCAG 2.2) of each text with the opaque background behind it: in SVG, the last filled rectangle or path
# that was painted below the middle of the text; else that of an element around it.
CONTRASTS = """() => {
  const parsed = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n }
  const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2])
  const inside = (box, x, y) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom
  const paper = (element, box) => {
    const svg = element.closest('svg'), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2
    if (svg) {
      const below = [...svg.querySelectorAll('path, rect')].filter(each => !each.closest('defs, clipPath')
        && each.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING
        && inside(each.getBoundingClientRect(), x, y))
      for (const each of below.reverse()) {
        const style = getComputedStyle(each)
        if (style.fill.startsWith('rgb') && parsed(style.fill)[3] * style.fillOpacity * style.opacity === 1)
          return parsed(style.fill)
      }
    }
    for (let each = svg || element; each; each = each.parentElement) {
      const colour = parsed(getComputedStyle(each).backgroundColor)
      if (colour[3] === 1) return colour
    }
    return [255, 255, 255, 1]
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, range = document.createRange()
    range.selectNodeContents(node)
    const box = range.getBoundingClientRect()
    if (!node.textContent.trim() || element.closest('style') || !box.width) continue
    const style = getComputedStyle(element), own = parsed(element.closest('svg') ? style.fill : style.color)
    const lights = [luminance(own), luminance(paper(element, box))].sort((a, b) => b - a)
    found.push([node.textContent.trim(), (lights[0] + 0.05) / (lights[1] + 0.05)])
  }
  return found
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The files of a report with all sections, of one that compares two runs, and of two ablations."""
    folder = tmp_path_factory.mktemp("reports")
    write_report(folder / "run", everything())
    runs = [run("a", "scratch"), run("b", "full_0", data="other", config={"seed": 1})]
    write_page(folder / "runs", title(runs), *page(runs))
    for name, study in (("ablation", many(folder / "ablation")), ("grid", in_grid(folder / "grid"))):
        write_page(folder / name, name, *ablation_page(Analysis(study)))
    return {name: folder / name / "report.html" for name in NAMES}


@pytest.fixture(
    scope="module",
    params=itertools.product(NAMES, WIDTHS, SCHEMES),
    ids=lambda each: "-".join(map(str, each)),
)
def opened(request, browser, reports):
    """A page with its width, and what it asked for and said."""
    name, width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = heard(tab)
    tab.goto(reports[name].as_uri())
    yield name, width, tab, said, asked
    tab.close()


def test_every_section_of_a_run_is_there_and_has_a_size(opened):
    name, _, tab, _, _ = opened
    shown = tab.evaluate("[...document.querySelectorAll('h2')].filter(e => e.offsetHeight).map(e => e.textContent)")
    linked = tab.evaluate(
        "[...document.querySelectorAll('nav a')].map(e => document.querySelector(e.hash)?.textContent)"
    )
    assert linked == shown
    if name == "run":
        assert set(SECTIONS) <= set(shown)
    sizes = tab.evaluate("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)")
    assert sizes and min(sizes) > 20


def test_nothing_is_wider_than_the_page(opened):
    _, width, tab, _, _ = opened
    assert tab.evaluate("document.documentElement.scrollWidth") <= width == tab.evaluate("innerWidth")
    wider = "e => !e.closest('.scroll, .figure') && e.getBoundingClientRect().right > innerWidth + 1"
    assert tab.evaluate(f"[...document.querySelectorAll('main *')].filter({wider}).map(e => e.outerHTML)") == []


def test_no_text_of_a_figure_is_cut_off(opened):
    _, _, tab, _, _ = opened
    outside = """[...document.querySelectorAll('svg text')].filter(e => {
        const own = e.getBoundingClientRect(), all = e.closest('svg').getBoundingClientRect()
        const sides = own.left < all.left - 1 || own.right > all.right + 1
        return sides || own.top < all.top - 1 || own.bottom > all.bottom + 1
    }).map(e => e.textContent)"""
    assert tab.evaluate(outside) == []


def test_every_text_has_a_contrast_of_at_least_four_and_a_half(opened):
    _, _, tab, _, _ = opened
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [(text, contrast) for text, contrast in found if contrast < 4.5] == []


def test_a_page_says_nothing_on_the_console_and_asks_for_nothing_but_itself(opened, reports):
    name, _, _, said, asked = opened
    assert said == [] and asked == [reports[name].as_uri()]


def test_a_page_can_be_read_without_a_script(browser, reports):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(reports["run"].as_uri())
    assert tab.locator("h2").count() >= len(SECTIONS) and tab.locator("svg").count() > 5
