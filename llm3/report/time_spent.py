"""The sections on wall time by part, and on the cost of each stage with all its ancestors."""

from llm3.errors import counted
from llm3.report.escape import escaped
from llm3.report.material import Material
from llm3.report.table import markdown_table
from llm3.report.units import NOT_APPLICABLE, count, duration

PARTS = {
    "tokenize": "tokenizing",
    "prepare": "preparing",
    "compile": "compiling",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving",
}
WALL_LEGEND = (
    "Wall time of all sessions together: a resumed stage adds to its time, up to the last save of a process that was "
    "killed. Tokenizing reads the data, or the cache; preparing is checking, initializing and loading parents."
)
CHAIN_LEGEND = (
    "Training of a stage and of all its ancestors up to the step that was handed over, from the first one on; time as "
    "in the matrix, for the training steps only."
)


def wall_section(material: Material) -> list[str]:
    """A line for what belongs to no stage, a line for each stage or recipe, and the sums."""
    lines = {"the run": dict(material.wall_seconds)} if material.wall_seconds else {}
    names = {id(row): f"{each.label} x{len(each.rows)}" for each in material.recipes for row in each.rows}
    for row in material.stages:
        parts = row.get("wall_seconds")
        if parts is None and row.get("evaluation_seconds") is not None:
            parts = {"evaluate": row["evaluation_seconds"]}
        line = lines.setdefault(names.get(id(row), row["stage"]), {})
        for part, seconds in (parts or {}).items():
            line[part] = line.get(part, 0.0) + seconds
    lines = {name: parts for name, parts in lines.items() if parts}
    if not lines:
        return []
    used = [part for part in PARTS if any(part in parts for parts in lines.values())]
    sums = {part: sum(parts.get(part, 0.0) for parts in lines.values()) for part in used}
    table = [_line(name, parts, used) for name, parts in lines.items()] + [_line("**all**", sums, used)]
    parts = ["## Wall time", markdown_table(["", *(PARTS[part] for part in used), "sum"], table), WALL_LEGEND]
    if material.sessions:
        number, (started, _) = counted(len(material.sessions), "session"), material.sessions[0]
        total = duration(sum(seconds for _, seconds in material.sessions))
        parts.append(f"{number}, the first from {started}: {total} in all.")
    return parts


def _line(name: str, parts: dict[str, float], used: list[str]) -> list[str]:
    seconds = [parts.get(part) for part in used]
    return [name, *(duration(each) for each in seconds), duration(sum(each or 0.0 for each in seconds))]


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
