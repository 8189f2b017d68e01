"""The sections on the resources of each stage, and on the cost of each stage with all its ancestors."""

from llm3.errors import counted
from llm3.report.escape import escaped
from llm3.report.material import Material
from llm3.report.table import markdown_table
from llm3.report.units import NOT_APPLICABLE, count, duration, gibibytes

PARTS = {
    "tokenize": "tokenizing",
    "prepare": "preparing",
    "compile": "compiling",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving",
}
WALL_LEGEND = (
    "Times are wall time of all sessions together: a resumed stage adds to its time, up to the last save of a process "
    "that was killed. A recipe has the sums of its seeds, but the largest peak of memory. Tokenizing reads the data, "
    "or the cache; preparing is checking, initializing and loading parents."
)
CHAIN_LEGEND = (
    "Training of a stage and of all its ancestors up to the step that was handed over, from the first one on; time as "
    "in the matrix, for the training steps only."
)


def resources_section(material: Material) -> list[str]:
    """A line for what belongs to no stage, a line for each stage or recipe, and the sums."""
    names = {id(row): f"{each.label} x{len(each.rows)}" for each in material.recipes for row in each.rows}
    groups: dict[str, list[dict]] = {"the run": [{"wall_seconds": material.wall_seconds}]}
    for row in material.stages:
        groups.setdefault(names.get(id(row), row["stage"]), []).append(row)
    times = {name: _seconds_by_part(rows) for name, rows in groups.items()}
    groups = {name: rows for name, rows in groups.items() if times[name]}
    if not groups:
        return []
    used = [part for part in PARTS if any(part in spent for spent in times.values())]
    table = [_line(name, rows, used) for name, rows in groups.items()]
    table.append(_line("**all**", [row for rows in groups.values() for row in rows], used))
    heads = ["", "tokens", "FLOPs", "peak GiB", *(PARTS[part] for part in used), "sum"]
    parts = ["## Resources", markdown_table(heads, table), WALL_LEGEND]
    if material.sessions:
        number, (started, _) = counted(len(material.sessions), "session"), material.sessions[0]
        total = duration(sum(seconds for _, seconds in material.sessions))
        parts.append(f"{number}, the first from {started}: {total} in all.")
    return parts


def _seconds_by_part(rows: list[dict]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        parts = row.get("wall_seconds")
        if parts is None and row.get("evaluation_seconds") is not None:
            parts = {"evaluate": row["evaluation_seconds"]}
        for part, seconds in (parts or {}).items():
            found[part] = found.get(part, 0.0) + seconds
    return found


def _line(name: str, rows: list[dict], used: list[str]) -> list[str]:
    """Tokens, FLOPs and seconds are sums, memory is the largest peak."""
    spent = _seconds_by_part(rows)
    tokens, flops, peaks = ([row[k] for row in rows if row.get(k)] for k in ("tokens", "flops", "peak_bytes"))
    cells = [count(sum(tokens) or None), count(sum(flops) or None), gibibytes(max(peaks, default=None))]
    return [name, *cells, *(duration(spent.get(part)) for part in used), duration(sum(spent.values()))]


def chain_section(material: Material) -> list[str]:
    """The cost of each stage with its ancestors, one line for replicates; empty if no row knows its ancestors."""
    lines = []
    for row in [*material.shown, *material.shown_baselines]:
        if chain := row.get("chain"):
            unknown = f" (without {', '.join(map(escaped, chain['unknown']))})" if chain["unknown"] else ""
            path = " → ".join(escaped(each) for each in [*chain["stages"], row["stage"]])
            costs = [count(chain["tokens"]), count(chain["flops"]), duration(chain["seconds"])]
            lines.append([f"{path}{unknown}", *(each or NOT_APPLICABLE for each in costs)])
    if not lines:
        return []
    return ["## Cost along each chain", markdown_table(["chain", "tokens", "FLOPs", "time"], lines), CHAIN_LEGEND]
