"""A campaign of kills: two processes of a run of three stages get SIGKILL, one or both of them, again and again.

    python -m tests.campaigns.kills --points=50 --seed=0 --out=DIR

The run in DIR/reference is left alone. Others are killed at seeded points inside tokenizing, saves, commits, hand-offs
and evaluations (`kill_points`), and started again with the same command, until they end; then they must have the same
results, bit for bit (`same_results`). After each fifth kill, a file is damaged (`damage`): the run makes it again, or
resumes from an earlier checkpoint, or refuses to start and names the file, which only then is put back. The process
that is not killed must end by itself within 60 seconds, with a status that lets a scheduler start it again.

DIR/points.jsonl has a line for each kill, DIR/summary.json the counts and all that went wrong. The exit status is 1 if
anything did. A run in which something did is kept.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.campaigns.kill_points import EVAL_EVERY, SAVE_EVERY, STAGES, STEPS, draw
from tests.campaigns.killed_run import KilledRun, launch
from tests.helpers import forks, tiny_run

KILLS_PER_DAMAGE = 5
EXTRA = f"""c.stages = {{name: c.stages[name].to_dict() for name in {STAGES}}}
for stage in c.stages.values():
    stage.update(steps={STEPS}, log_every=1, save_every={SAVE_EVERY}, eval_every={EVAL_EVERY}, eval_documents=2)
c.stages.finetune.train = "top(1)"
c.mesh = dict(data=1, fsdp=-1)
c.samples = ["The"]
c.sample_tokens = 2
"""


def campaign(out: Path, points: int, seed: int) -> dict[str, Any]:
    """Kill until there are so many kills. Returns the summary."""
    pick, began = random.Random(seed), time.monotonic()
    tiny_run.write_texts(out / "base" / "texts")
    config = tiny_run.write_config(out / "config.py", out / "base", EXTRA)
    if (alone := launch(config, out / "reference", None)).statuses != (0, 0):
        raise SystemExit(f"the run that is left alone has failed:\n{alone.text}")
    rows: list[dict[str, Any]] = []
    problems: dict[str, list[str]] = {}
    while len(rows) < points:
        kills = draw(pick)
        kills = [kills[place] for place in sorted(pick.sample(range(len(kills)), min(len(kills), points - len(rows))))]
        run = KilledRun(config, out / f"run-{len(problems) + 1}", len(rows) + 1)
        for kill in kills:
            row = run.kill(kill)
            if row and row["number"] % KILLS_PER_DAMAGE == 0:
                run.damage(row["number"] // KILLS_PER_DAMAGE - 1, pick)
            print(json.dumps(row) if row else f"not reached: {kill}", flush=True)
        run.finish(out / "reference")
        rows += run.rows
        problems[run.directory.name] = run.problems
        with (out / "points.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in run.rows)
        print(f"{run.directory.name} has ended; problems: {len(run.problems)}", *run.problems, sep="\n", flush=True)
        if not run.problems:
            shutil.rmtree(run.directory)
        if not run.rows:
            break  # no point was reached
    return summary(rows, problems) | {"seed": seed, "minutes": round((time.monotonic() - began) / 60, 1)}


def summary(rows: list[dict[str, Any]], problems: dict[str, list[str]]) -> dict[str, Any]:
    """Counts of the kills and of what came of them, and the problems of each run."""

    def counts(key: str) -> dict[str, int]:
        return dict(sorted(collections.Counter(str(row[key]) for row in rows).items()))

    return {
        "kills": len(rows),
        "runs": len(problems),
        **{key: counts(key) for key in ("place", "stage", "who", "status")},
        "longest_seconds": max((row["seconds"] or 0 for row in rows), default=0),
        "damages": {f"{row['number']}: {row['damage']}": row["came_of_it"] for row in rows if "damage" in row},
        "problems": {name: found for name, found in problems.items() if found},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    os.environ["LLM3_TEST_COMPILED"] = str(args.out.absolute() / "compiled")
    try:
        found = campaign(args.out.absolute(), args.points, args.seed)
    finally:
        forks.stop()
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["problems"]) or found["kills"] < args.points)
