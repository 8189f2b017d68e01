"""The page in a real browser, headless Chromium, over a server on loopback: asked, read, hovered, and opened again."""

import json
import math
import urllib.parse
import urllib.request

import pytest

from tests.helpers.browsers import chromium, heard
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_export import ADDED, STAGE, tokenizer, write_run
from tests.helpers.tiny_predict import LABELS, MODELS, OBJECTIVES, SOURCES
from tests.helpers.tiny_serve import Listening

pytestmark = pytest.mark.slow
PROMPT, TEXT = "The quick 数学 fox", "The quick brown fox.\njumps  over naïve 数学 🙂"
STAGES = {"pretrain": "scores", "chat": "answers", "finetune": "labels"}

# The least contrast (WCAG 2.2) of a text with all the backgrounds around it, painted one over the other.
CONTRAST = """() => {
  const brush = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
  const luminance = colours => {
    brush.clearRect(0, 0, 1, 1)
    for (const each of colours) { brush.fillStyle = each; brush.fillRect(0, 0, 1, 1) }
    const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map(linear)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, papers = []
    const ignored = element.closest('.unseen, :disabled, noscript')
    if (!node.textContent.trim() || ignored || !element.checkVisibility()) continue
    for (let each = element; each; each = each.parentElement) papers.unshift(getComputedStyle(each).backgroundColor)
    const paper = luminance(papers), ink = luminance([...papers, getComputedStyle(element).color])
    found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), node.textContent.trim()])
  }
  return found.sort((a, b) => a[0] - b[0])
}"""

# The lengths that the first answer has while it grows.
GROWTH = """() => {
  const box = document.querySelector('article .answer'), note = () => lengths.add(box.textContent.length)
  window.lengths = new Set()
  new MutationObserver(note).observe(box, { childList: true, subtree: true })
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The server of a run whose stages continue texts, chat and label, each with the one before as its parent."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    run.mkdir()
    lineage: list[dict] = []
    for seed, (name, kind) in enumerate(STAGES.items()):
        config = model_config(vocab_size=tokenizer().vocab_size, **MODELS[kind])
        labels, template = LABELS if kind == "labels" else (), ADDED if kind == "answers" else ""
        about = {"stage": name, "kind": "finetune" if seed else "pretrain", "lineage": lineage}
        about |= {"sources": {"task": SOURCES[kind]}, "objective": OBJECTIVES[kind], "template": template}
        about |= {"lm_head": kind != "labels", "cost": {"tokens": 1000}}
        write_run(run, config, make_params(config, seed), labels, **about)
        (run / STAGE).rename(run / name)
        lineage = [*lineage, {"run": ".", "stage": name, "step": 7, "kind": about["kind"], "params_digest": "0" * 64}]
    with Listening([run], most_steps=1) as listening:
        yield listening.url


def link(address: str, **state) -> str:
    return f"{address}/#{urllib.parse.urlencode(state)}"


def opened(browser, url: str, width: int = 1200, **options):
    """A page that has answered what its address says, what it said and what it asked for."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, **options)
    said, asked = heard(tab)
    tab.goto(url)
    done(tab)
    return tab, said, asked


def done(tab) -> None:
    """Wait for all answers."""
    tab.wait_for_selector("#stop:disabled", timeout=120_000)


def column(tab, name: str):
    return tab.locator(f"article[data-name={name}]")


def answer(tab, name: str) -> str:
    """The text that a stage has made."""
    own = "e => e.textContent.slice(e.querySelector('.given')?.textContent.length)"
    return column(tab, name).locator(".text-of").evaluate(own)


def percent(logprob: float) -> str:
    share = math.exp(logprob)
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def post(address: str, path: str, **body) -> dict:
    """The answer of the API without a browser."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def completed(address: str, seed: int) -> str:
    settings = {"max_tokens": 24, "temperature": 0.8, "top_p": 1, "logprobs": 5, "seed": seed}
    return post(address, "/v1/completions", model="pretrain", prompt=PROMPT, **settings)["choices"][0]["text"]


def test_a_prompt_is_answered_by_each_stage_in_its_way_and_tokens_show_their_numbers(browser, address):
    tab, said, asked = opened(browser, address)
    tab.fill("textarea[name=text]", PROMPT)
    tab.fill("input[name=max_tokens]", "24")
    tab.keyboard.press("Control+Enter")
    done(tab)
    assert answer(tab, "pretrain") == completed(address, seed=0) and len(answer(tab, "chat")) > 0
    shares = column(tab, "finetune").locator(".share").all_text_contents()
    assert len(shares) == len(LABELS) and sum(float(each.removesuffix(" %")) for each in shares) == pytest.approx(
        100, 0.01
    )
    said_aloud = tab.locator("#status p").all_text_contents()
    assert sorted(each.split(":")[0] for each in said_aloud) == sorted(STAGES)

    token, tip = column(tab, "pretrain").locator(".token").first, tab.locator("#tip")
    token.hover()
    assert tip.is_visible()
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    token.focus()
    assert tip.is_visible() and token.get_attribute("aria-describedby") == "tip"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.previousElementSibling.className.includes('token')")
    assert said == [] and all(each.startswith(address) or each == "data:," for each in asked)
    tab.close()


def test_a_seed_changes_the_answers_and_a_link_brings_them_back(browser, address):
    tab, _, _ = opened(browser, link(address, mode="own", text=PROMPT, max_tokens=24, seed=3))
    first = {name: answer(tab, name) for name in ("pretrain", "chat")}
    assert first["pretrain"] == completed(address, seed=3)
    tab.evaluate(GROWTH)
    tab.click("#again")
    done(tab)
    assert tab.evaluate("lengths.size") > 3
    second = {name: answer(tab, name) for name in first}
    assert all(first[name] != second[name] for name in first)
    assert dict(urllib.parse.parse_qsl(tab.evaluate("location.hash.slice(1)")))["seed"] == "4"
    again, _, _ = opened(browser, tab.url)
    assert {name: answer(again, name) for name in first} == second
    tab.go_back()
    done(tab)
    assert {name: answer(tab, name) for name in first} == first
    tab.close()
    again.close()


def test_a_chat_goes_on_and_its_link_holds_all_messages(browser, address):
    tab, said, _ = opened(browser, link(address, mode="chat", max_tokens=8, seed=1))
    texts = []
    tab.get_by_label("System prompt").fill("Be brief.")
    for message in ("Hello?", "And 数学?"):
        tab.fill("textarea[name=text]", message)
        tab.click("#go")
        done(tab)
        texts = column(tab, "chat").locator(".text-of").all_text_contents()
    assert len(texts) == 2 and column(tab, "chat").locator(".turn").all_text_contents() == ["Hello?", "And 数学?"]
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}
    settings = {"max_tokens": 8, "temperature": 0.8, "top_p": 1, "seed": 1, "logprobs": True, "top_logprobs": 5}
    answered = [
        post(address, "/v1/chat/completions", model="chat", messages=messages, **settings)["choices"][0]["message"]
        for messages in ([system, user], [user])
    ]
    assert texts[0] == answered[0]["content"] != answered[1]["content"]
    assert "without a chat template" in column(tab, "pretrain").text_content()
    again, _, _ = opened(browser, tab.url, 400)
    assert column(again, "chat").locator(".text-of").all_text_contents() == texts
    system_prompt = again.get_by_label("System prompt")
    assert system_prompt.input_value() == "Be brief." and system_prompt.is_visible()
    assert again.evaluate("document.documentElement.scrollWidth") <= 400
    again.locator(".modes label", has_text="Continue").click()
    assert not system_prompt.is_visible()
    tab.get_by_label("System prompt").fill("")
    tab.click("#go")
    done(tab)
    changed = column(tab, "chat").locator(".text-of").all_text_contents()
    assert len(changed) == 2 and changed[0] == answered[1]["content"]
    for go, expected in ((tab.go_back, texts), (tab.go_forward, changed)):
        go()
        done(tab)
        assert column(tab, "chat").locator(".text-of").all_text_contents() == expected
    assert said == []
    tab.close()
    again.close()


def test_a_text_is_read_by_each_stage_and_compared_with_its_parent(browser, address):
    tab, said, _ = opened(browser, link(address, mode="score", text=TEXT, colour="change"))
    read = {name: post(address, "/score", model=name, text=TEXT) for name in ("pretrain", "chat")}
    bits = {name: each["bits_per_byte"] for name, each in read.items()}
    rows = [row.locator("th, td").all_text_contents() for row in tab.locator("#comparison tbody tr").all()]
    change = f"{bits['chat'] - bits['pretrain']:+.3f}".replace("-", "−")  # noqa: RUF001
    assert [row[:3] for row in rows] == [
        ["pretrain", f"{bits['pretrain']:.3f}", "–"],  # noqa: RUF001
        ["chat", f"{bits['chat']:.3f}", f"{change} since pretrain"],
    ]
    assert column(tab, "chat").locator(".text-of").text_content() == TEXT
    part = read["chat"]["tokens"][2]
    column(tab, "chat").locator(".token").nth(2).hover()
    numbers, alternatives = tab.locator("#tip p").first.text_content(), tab.locator("#tip dd.share").all_text_contents()
    assert f"{percent(part['logprob'])}, {-part['logprob'] / math.log(2):.2f} bits" in numbers
    assert alternatives[:5] == [percent(each["logprob"]) for each in part["top"]]
    levels = [each.get_attribute("class") for each in column(tab, "chat").locator(".token").all()]
    assert sum(" c" in each for each in levels) > len(levels) / 2
    assert said == []
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1800])
def test_a_page_fits_its_width_and_can_be_read_in_both_schemes(browser, address, width, scheme):
    for state in (
        {"mode": "own", "text": PROMPT, "max_tokens": 24},
        {"mode": "score", "text": TEXT, "colour": "change"},
    ):
        tab, said, _ = opened(browser, link(address, **state), width, color_scheme=scheme)
        column(tab, "pretrain").locator(".token").first.click()
        assert tab.locator("#tip").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        found = tab.evaluate(CONTRAST)
        assert len(found) > 50 and [each for each in found if each[0] < 4.5] == []
        assert said == []
        tab.close()


# What boxes of tokens hold after some parts of an answer: each a text with the names of its tokens.
GROWN = """async cases => {
  const { Growing } = await import('/static/tokens.js')
  return cases.map(parts => {
    const box = document.createElement('p'), growing = new Growing(box)
    for (const [text, names] of parts) growing.add(text, names.map(text => ({ text, logprob: -1, top: [] })))
    growing.add('', [], true)
    return [...box.childNodes].map(each => [each.textContent, each.className ? 'token' : 'text'])
  })
}"""


def test_tokens_are_found_in_the_text_that_they_make(browser, address):
    cases = {
        "as they come": [["one two", ["one", " two"]]],
        "before their text": [["", ["a"]], ["", ["b"]], ["ab", []]],
        "parts of characters": [["", [r"bytes:\xe6\x95"]], ["数a", [r"bytes:\xb0", "a"]]],
        "no characters": [["", [r"bytes:\xff"]], ["\ufffda", ["a"]]],
        "with an end that is no text": [["a", ["a", "<|eos|>"]]],
        "with a text that is not theirs": [["the cat", [" the", " cat"]]],
        "without names": [["a", []], ["b", []]],
    }
    expected = [["one", " two"], ["a", "b"], ["数", "a"], ["\ufffd", "a"], ["a"], ["the", " cat"], ["a", "b"]]
    kinds = ["token"] * 6 + ["text"]
    tab, _, _ = opened(browser, address)
    found = tab.evaluate(GROWN, [*cases.values()])
    for name, own, texts, kind in zip(cases, found, expected, kinds, strict=True):
        assert own == [[text, kind] for text in texts], name
    tab.close()


def test_a_busy_server_is_shown_in_the_column_which_can_be_asked_again(browser, address):
    tab = browser.new_page()
    error = {"error": {"message": "64 requests wait already", "type": "server_error", "param": None, "code": "busy"}}
    busy = lambda route: route.fulfill(status=503, headers={"Retry-After": "9"}, json=error)  # noqa: E731
    tab.route("**/v1/completions", busy)
    tab.goto(link(address, mode="own", text=PROMPT, max_tokens=24))
    done(tab)
    problem = column(tab, "pretrain").locator(".problem")
    assert "64 requests wait already. Ask again in 9 s." in problem.text_content()
    assert answer(tab, "chat") != ""
    tab.unroute("**/v1/completions")
    problem.get_by_role("button").click()
    column(tab, "pretrain").locator(".token").first.wait_for()
    tab.close()
