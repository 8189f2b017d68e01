"""How an ablation came about: failed stage runs, what differs between arms, the command, and the machine."""

from collections.abc import Iterator, Mapping
from typing import Any

from llm3.ablation.analysis import Analysis
from llm3.ablation.graph import directory
from llm3.ablation.sections.parts import Part
from llm3.ablation.study import Study
from llm3.files import SESSIONS, read_json
from llm3.report.escape import block, escaped

MOST_DIFFERENCES = 24  # variants whose config is shown
FACTS = ("devices", "compute dtype", "vocabulary")


def failures(analysis: Analysis) -> Iterator[Part]:
    """The stage runs that failed, and the arms that wait for them."""
    study = analysis.study
    if not study.failed:
        return
    yield "## Failed stage runs"
    lines, variants = [], study.variants
    for name, why in study.failed.items():
        users = [(each.name, seed) for each in variants for seed, chain in each.chains.items() if name in chain]
        needed = ", ".join(f"{arm} with seed {seed}" for arm, seed in users) or "no arm any more"
        lines.append(f"- {escaped(name)} ({escaped(needed)}): {escaped(_without(study, why))}")
    yield "\n".join(lines)
    yield "Each has a log.txt in its folder in `runs`. The same command tries them again."


def _without(study: Study, text: str) -> str:
    """A text without the place of the ablation."""
    for place in (f"{study.workdir.resolve()}/", f"{study.workdir}/"):
        text = text.replace(place, "")
    return text


def differences(analysis: Analysis) -> Iterator[Part]:
    """How the config of each variant differs from the base."""
    variants = [each for each in analysis.study.variants if each.differs]
    if not variants:
        return
    yield "## Differences between arms"
    yield "Fields whose values differ from the base, as base / arm."
    lines = []
    for each in variants[:MOST_DIFFERENCES]:
        lines += [each.name, *(f"  {line}" for line in each.differs)]
    yield block("\n".join(lines))
    if len(variants) > MOST_DIFFERENCES:
        yield f"These are the first {MOST_DIFFERENCES} of {len(variants)} variants; ablation.json has all."


def reproduce(analysis: Analysis) -> Iterator[Part]:
    """The command, and the code and machine of the stage runs."""
    study = analysis.study
    yield "## How to reproduce it"
    yield block(study.command, "bash")
    runs = {name for each in study.variants for chain in each.chains.values() for name in chain}
    done = sum((directory(study.workdir, name) / SESSIONS).is_file() for name in runs)
    lines = [f"- stage runs: {len(runs)}, of which {done} were begun"]
    for name, values in environment(study).items():
        lines.append(f"- {name}: {escaped('; '.join(values))}")
    yield "\n".join(lines)


def environment(study: Study) -> dict[str, list[str]]:
    """{name: the different values in all sessions of the stage runs}: commit, versions, devices; no dates, no paths."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for each in study.variants for chain in each.chains.values() for name in chain):
        for session in read_json(directory(study.workdir, name) / SESSIONS) or []:
            facts: Mapping[str, Any] = session.get("facts") or {}
            known = {**(session.get("environment") or {}), **{key: facts.get(key) for key in FACTS}}
            for key, value in known.items():
                if value is not None and str(value) not in found.setdefault(key, []):
                    found[key].append(str(value))
    return {key: sorted(values) for key, values in found.items() if values}
