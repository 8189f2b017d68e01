"""The page that asks every stage: its HTML, and the files that it loads. `static/` has what it does in the browser."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm3.report.html import colours
from llm3.serve.overview import Cell, Column, Evaluated, Node, Overview, overview
from llm3.serve.service import Service

STATIC = Path(__file__).with_name("static")
SCRIPTS = ("page.js", "answers.js", "requests.js", "state.js", "tokens.js")
FILES = {"page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
# The browser refuses scripts, styles and requests that are not of this server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SHADES = 6  # of the cells of a matrix: classes of page.css

# {mode: (its name, the task that it needs, what the text is, help)}; "own": each stage does what it was trained for
MODES = {
    "own": ("Prompt", "", "Prompt", "Each stage answers in its own way: with a text, as a chat, or with labels."),
    "completions": ("Continue", "completions", "Text to continue", "Each stage continues the text."),
    "chat": ("Chat", "chat", "Message", "Each stage answers by the chat template that it was trained with."),
    "classify": ("Labels", "classify", "Text to label", "Each stage gives the probability of each label."),
    "score": (
        "Bits per byte",
        "score",
        "Text to read",
        "Each stage reads the text: the fewer bits it needs for a byte, the better it knows such text.",
    ),
    "fill": ("Fill in", "fill", "Text with masks", "Each stage proposes tokens for each mask."),
    "spans": ("Question", "spans", "Context", "Each stage marks the answer in the context."),
}
# The class of a token by its surprise, -log2 of its probability: s0 below 1 bit, and so on (as in tokens.js).
SURPRISE = ("<1", "1-2", "2-4", "4-6", "6-9", "9+")
CHANGE = ("3+ fewer", "1-3 fewer", "¼-1 fewer", "same", "¼-1 more", "1-3 more", "3+ more")


def routes(service: Service) -> list[Route]:
    """The routes of the page and of the files that it loads; nothing else is readable."""
    files = {name: (STATIC / name).read_text(encoding="utf-8") for name in FILES}
    files["page.css"] = colours() + files["page.css"]

    def page(_: Request) -> Response:
        content = overview(service.stages, service.tasks)
        return Response(page_html(content), media_type="text/html", headers={"Content-Security-Policy": POLICY})

    def file(name: str) -> Route:
        def answer(_: Request) -> Response:
            return Response(files[name], media_type=FILES[name])

        return Route(f"/static/{name}", answer)

    return [Route("/", page), *map(file, FILES)]


def page_html(content: Overview) -> str:
    """The page. All names and texts of the runs are escaped."""
    tasks = {task for each in content.columns for task in each.tasks}
    modes = [name for name, (_, task, *_) in MODES.items() if not task or task in tasks]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Ask every stage - {escape(content.title)}</title>\n"
        '<link rel="stylesheet" href="/static/page.css">\n<script type="module" src="/static/page.js"></script>\n'
        "</head>\n<body>\n"
        f"<header><h1>Ask every stage</h1><p>{escape(content.title)}</p></header>\n"
        "<noscript><p>This page needs JavaScript to ask the stages; the server has an API too.</p></noscript>\n"
        f'<main>\n{form(modes)}\n{legend()}\n<section id="comparison" aria-label="Bits per byte by stage" '
        f'tabindex="0" hidden></section>\n<div id="columns">\n{"".join(map(article, content.columns))}</div>\n'
        '<div id="apart"></div>\n</main>\n'
        f'<aside aria-label="The run">\n{tree(content.lineage)}\n{"".join(map(matrix, content.matrices))}</aside>\n'
        '<div id="tip" role="tooltip" hidden></div>\n<p id="status" role="status" class="unseen"></p>\n'
        "</body>\n</html>\n"
    )


def form(modes: Sequence[str]) -> str:
    """What is asked, and how. modes: those that a stage can answer."""
    choices = "".join(
        f'<label><input type="radio" name="mode" value="{mode}" data-text="{MODES[mode][2]}" '
        f'data-help="{MODES[mode][3]}"{" checked" * (mode == modes[0])}><span>{MODES[mode][0]}</span></label>'
        for mode in modes
    )
    settings = "".join(
        f'<label>{label} <input type="number" name="{name}" value="{value}" min="{least}" max="{most}" step="{step}" '
        f'inputmode="decimal" required></label>'
        for name, label, value, least, most, step in (
            ("max_tokens", "Max tokens", "64", "1", "100000", "1"),
            ("temperature", "Temperature", "0.8", "0", "2", "any"),
            ("top_p", "Top p", "1", "0", "1", "any"),
            ("seed", "Seed", "0", "0", "2147483647", "1"),
        )
    )
    return (
        '<form id="ask" autocomplete="off">\n'
        f'<fieldset class="modes"><legend class="unseen">What to ask</legend>{choices}</fieldset>\n'
        '<p id="help"></p>\n'
        '<label class="system" hidden>System prompt (optional) <textarea name="system" rows="2"></textarea></label>\n'
        '<ol id="turns" aria-label="Earlier messages" hidden></ol>\n'
        '<label class="question" hidden>Question <input name="question"></label>\n'
        '<label class="text"><span>Prompt</span> <textarea name="text" rows="4" spellcheck="false" '
        'aria-keyshortcuts="Control+Enter" aria-describedby="help"></textarea></label>\n'
        f'<fieldset class="settings"><legend class="unseen">Sampling</legend>{settings}</fieldset>\n'
        '<p class="buttons"><button id="go" title="Ctrl+Enter">Ask</button>'
        '<button type="button" id="stop" disabled>Stop</button>'
        '<button type="button" id="again" title="Ask again with the next seed">Next seed</button>'
        '<button type="button" id="mask" hidden>Insert mask</button>'
        '<button type="button" id="fresh" hidden>New conversation</button>'
        "<span>The address of the page holds all of this: copy it to share or keep it.</span></p>\n</form>"
    )


def legend() -> str:
    """What the colours of tokens mean."""
    surprise = _swatches("s", SURPRISE)
    change = _swatches("c", CHANGE)
    return (
        '<div id="legend" hidden><fieldset><legend class="unseen">Colour of the tokens</legend>'
        '<label><input type="radio" name="colour" value="surprise" checked>Surprise</label>'
        '<label><input type="radio" name="colour" value="change">Change since the parent</label></fieldset>'
        f'<p data-colour="surprise">Surprise in bits: {surprise}</p>'
        f'<p data-colour="change" hidden>Bits, compared with the parent: {change}</p></div>'
    )


def _swatches(letter: str, texts: Iterable[str]) -> str:
    return "".join(f'<span class="token {letter}{at}">{text}</span>' for at, text in enumerate(texts)).replace(
        "><", "> <"
    )


def article(column: Column) -> str:
    """The column of a stage, without an answer."""
    facts = {"name": column.name, "own": column.own_task, "parent": column.parent, "mask": column.mask}
    data = "".join(f' data-{key}="{escape(value)}"' for key, value in facts.items())
    labels = f" · labels: {escape(_listed(column.labels))}" if column.labels else ""
    return (
        f'<article{data} data-tasks="{" ".join(column.tasks)}" aria-label="{escape(column.name)}">'
        f'<header><h2>{escape(column.name)}</h2><p>{escape(column.note)}{labels}</p></header><div class="answer"></div>'
        '<p class="foot"></p></article>\n'
    )


def _listed(labels: Sequence[str], most: int = 4) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def tree(nodes: Sequence[Node]) -> str:
    """The lineage as nested lists, with a box to tick for each stage that answers."""
    children: dict[str, list[Node]] = {}
    for each in nodes:
        children.setdefault(each.parent, []).append(each)

    def items(parent: str) -> str:
        return "".join(f"<li>{entry(each)}{below(each.key)}</li>" for each in children.get(parent, ()))

    def below(key: str) -> str:
        inner = items(key)
        return f"\n<ul>{inner}</ul>" if inner else ""

    def entry(node: Node) -> str:
        text = f"<span>{escape(node.label)} <small>{escape(node.note)}</small></span>"
        if not node.column:
            return f'<p class="absent">{text}</p>'
        box = f'<input type="checkbox" name="stage" value="{escape(node.column)}" form="ask" checked>'
        return f"<label>{box}{text}</label>"

    return (
        '<section id="lineage"><h2>Lineage</h2><p>Each stage began with the parameters of the one above it. Ticked '
        f"stages answer.</p><ul>{items('')}</ul></section>"
    )


def matrix(found: Evaluated) -> str:
    """The evaluations of a run."""
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in found.heads)

    def shown(each: Cell) -> str:
        shade = "" if each.shade is None else f' class="h{round(each.shade * (SHADES - 1))}"'
        return f"<td{shade}>{escape(each.text)}</td>"

    def row(stage: str, cells: Iterable[Cell], baseline: bool) -> str:
        kind = ' class="baseline"' if baseline else ""
        return f'<tr{kind}><th scope="row">{escape(stage)}</th>{"".join(map(shown, cells))}</tr>'

    return (
        f'<section class="matrix"><h2>Evaluations of {escape(found.run)}</h2><div class="scroll" tabindex="0" '
        f'role="region" aria-label="Evaluations of {escape(found.run)}"><table><thead><tr><th scope="col">stage</th>'
        f"{heads}</tr></thead><tbody>{''.join(row(*each) for each in found.rows)}</tbody></table></div>"
        "<p>The darker a cell, the better among the trained stages. In brackets: the change since the parent. Italics: "
        "baselines.</p></section>\n"
    )
