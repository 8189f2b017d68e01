"""Metrics of `bench` as text, with units."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm3.report.units import NOT_APPLICABLE, count, memory_text, percent, seconds

WORDS = {
    "temp_bytes": "temporary memory",
    "argument_bytes": "memory of arguments",
    "opt_bytes": "memory of moments",
    "gradient_bytes": "memory of gradients",
    "compiled_programs": "programs compiled",
    "cached_programs": "programs found compiled",
}
SHARES = ("mfu", "hfu", "data_wait_share")
APART = ("full", "ratios", "peers", "profile")  # keys of the metrics that are tables of their own


def table(metrics: dict) -> str:
    """A text table of the metrics with units, one per line, compared with full training if there is a comparison."""
    own = {key: value for key, value in metrics.items() if key not in APART}
    more = [*_peers(metrics), *_profile(metrics)]
    if "full" not in metrics:
        return "\n".join([*(f"{words(key):<26}{_text(key, value)}" for key, value in own.items()), *more])
    full, ratios = metrics["full"], metrics["ratios"]
    lines = [f"{'':<26}{metrics['stage']:>18}{'trains all':>18}{'ratio':>8}"]
    for key, value in own.items():
        if key in full:
            ratio = ratios.get(key)
            share = "" if ratio is None else f"{ratio:.3f}"
            lines.append(f"{words(key):<26}{_text(key, value):>18}{_text(key, full[key]):>18}{share:>8}".rstrip())
        elif key != "stage":
            lines.insert(0, f"{words(key):<26}{_text(key, value)}")
    return "\n".join([*lines, *more])


def _peers(metrics: dict) -> list[str]:
    return [
        f"{name}: {seconds(each['step_seconds'])} {each['of']}, {each['ratio']:.2f} times as long "
        f"({each['ratio_min']:.2f} to {each['ratio_max']:.2f} in {each['pairs']} turns); {each['about']}"
        for name, each in metrics.get("peers", {}).items()
    ]


def _profile(metrics: dict) -> list[str]:
    if not (found := metrics.get("profile")):
        return []
    where = f"trace: {found['directory']} (*.trace.json.gz: ui.perfetto.dev; *.xplane.pb: XProf)"
    classes = [[name, seconds(each["seconds"]), percent(each["share"])] for name, each in found["classes"].items()]
    operations = [
        [
            each["name"],
            each["class"],
            seconds(each["seconds"]),
            percent(each["share"]),
            f"{each['calls']:g}",
            each["of"],
        ]
        for each in found["operations"]
    ]
    return [
        "",
        where,
        *columns(["class", "of a step", "share"], classes),
        *columns(["operation", "class", "of a step", "share", "calls", "of"], operations),
    ]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(map(len, each)) for each in zip(header, *rows, strict=True)]
    aligned = (zip(row, widths, strict=True) for row in (header, *rows))
    return ["  ".join(f"{text:<{width}}" for text, width in row).rstrip() for row in aligned]


def sweep_table(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    """The combinations of a sweep, in the order in which they were tried, and the best."""
    header = ["remat", "micro-batches", "unroll", "attention", "step time", "range", "tokens/s", "MFU", "memory", ""]
    lines = []
    for each in rows:
        combination = [each["remat"], str(each["micro_batches"]), str(each["scan_unroll"]), each["attention"]]
        memory = memory_text(each["device_bytes"]) if each.get("device_bytes") else ""
        if "error" in each:
            lines.append([*combination, "", "", "", "", memory, each["error"]])
            continue
        span = f"{seconds(each['step_seconds_min'])} to {seconds(each['step_seconds_max'])}"
        rates = [seconds(each["step_seconds"]), span, count(each["tokens_per_second"]), percent(each["mfu"])]
        lines.append([*combination, *rates, memory, "as configured" if each["configured"] else ""])
    return "\n".join([*columns(header, lines), best])


def words(key: str) -> str:
    """What a metric is, without the unit that its value has: step_seconds_min is "step time min"."""
    return WORDS.get(key) or key.removesuffix("_tokens_per_second").replace("_seconds", "_time").replace("_", " ")


def _text(key: str, value: Any) -> str:
    """The value of a metric with its unit, which the name of the metric tells."""
    if value is None or isinstance(value, str):
        return value or NOT_APPLICABLE
    if key == "matmul_peak":
        return f"{count(value)}FLOP/s"
    if "_per_second" in key:
        return f"{count(value)}{'FLOP' if 'flops' in key else ' tokens'}/s"
    if "flops" in key:
        return f"{count(value)}FLOP"
    if "seconds" in key:
        return seconds(value)
    if key.endswith("bytes"):
        return memory_text(value)
    return percent(value) if key in SHARES else count(value)
