"""One run that is killed, damaged and started again until its end, and what it must not do meanwhile."""

import json
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns import damage, same_results
from tests.campaigns.kill_points import REPORTED, STAGES, Kill
from tests.helpers import forks, tiny_deaths
from tests.helpers.tiny_cluster import free_port, variables

KEPT = 2  # checkpoints of a stage
REACHES_WITHIN, ENDS_WITHIN = 300, 60  # seconds: a launch its point or its end; the other process, after a kill
MAY_PASS = {4, 7}  # exit statuses with which a scheduler starts a run again, as after a signal: docs/cluster.md
REFUSED = (2, 2)


class Launch(NamedTuple):
    """How two processes ended. statuses: negative for a signal, None for a process that did not end.

    seconds: from the end of the first victim to that of the other process. text: what both have printed.
    """

    statuses: tuple[int | None, int | None]
    seconds: float
    text: str


def launch(config: Path, directory: Path, kill: Kill | None) -> Launch:
    """Start two processes of the run in `directory`, and wait for their end. None: nobody is killed."""
    command = ["run", f"--config={config}", f"--workdir={directory}", f"--config.cache_dir={directory / 'cache'}"]
    port, arguments = free_port(), json.dumps([command])
    actor, victims = (kill.actor, kill.victims) if kill else (0, ())
    other = forks.Fork(["", arguments], variables(port, 1 - actor))
    pids = {tiny_deaths.VICTIMS: ",".join(str(0 if each == actor else other.pid) for each in victims)} if kill else {}
    own = forks.Fork([f"SIGKILL@{kill.point}" if kill else "", arguments], variables(port, actor) | pids)
    started = {1 - actor: other, actor: own}
    first = victims[0] if kill else 1
    try:
        in_time = _ends(started[first], REACHES_WITHIN)
        since = time.monotonic()
        if in_time:
            _ends(started[1 - first], 2 * ENDS_WITHIN)
        seconds = time.monotonic() - since
        statuses = started[0].returncode, started[1].returncode
    finally:
        for each in started.values():
            each.kill()
    return Launch(statuses, round(seconds, 1), "".join(text for n in (0, 1) for text in started[n].communicate(60)))


def _ends(fork: forks.Fork, seconds: float) -> bool:
    try:
        fork.communicate(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def steps(directory: Path, stage: str) -> list[int]:
    """The steps of the committed checkpoints of a stage, ascending."""
    found = (directory / stage / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


class KilledRun:
    """A run from an empty folder to its end.

    rows: one for each kill. problems: what went wrong. damages: by the number of the kill that they came after.
    """

    def __init__(self, config: Path, directory: Path, first: int):
        self._config, self.directory, self._number = config, directory, first
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.damages: dict[int, damage.Damage] = {}
        self._came: dict[int, str] = {}  # of the damages

    def kill(self, kill: Kill) -> dict[str, Any] | None:
        """Start the run, and kill at a point. Returns its row; None if that point was not reached."""
        launched = self._launch(kill)
        if not all(launched.statuses[each] == -9 for each in kill.victims):
            if launched.statuses != (0, 0):
                self._problem(f"{kill.point} was not reached: {launched.statuses}", launched)
            return None
        number = self._number + len(self.rows)
        row = {"number": number, **kill._asdict(), "stage": kill.stage, "seconds": None, "status": None}
        if len(kill.victims) == 1:
            row |= {"seconds": launched.seconds, "status": launched.statuses[1 - kill.victims[0]]}
            if row["status"] is None or launched.seconds > ENDS_WITHIN:
                self._problem(f"{kill.point}: the other process went on for {launched.seconds} s", launched)
            elif row["status"] == 0 and kill.point == REPORTED:
                pass  # nothing of the run was left to do, but for the report
            elif row["status"] >= 0 and row["status"] not in MAY_PASS:
                self._problem(f"{kill.point}: the other process ended with {row['status']}", launched)
        self.rows.append(row)
        return row

    def damage(self, count: int, pick: random.Random) -> None:
        """Damage a file after the last kill. count: of the damages before, in all runs."""
        if done := damage.do(self.directory, count, pick):
            self.damages[self.rows[-1]["number"]] = done
            self.rows[-1]["damage"] = str(done)

    def finish(self, reference: Path) -> None:
        """Let the run end, and compare it with the reference."""
        launched = self._launch(None)
        if launched.statuses != (0, 0):
            self._problem(f"the last launch ended with {launched.statuses}", launched)
        else:
            self._judge(reference)
        for row in self.rows:
            if row["number"] in self.damages:
                row["came_of_it"] = self._came.get(row["number"], "unknown")

    def _problem(self, text: str, launched: Launch) -> None:
        self.problems.append(f"{text}\n{launched.text[-3000:]}")

    def _launch(self, kill: Kill | None) -> Launch:
        """Launch until no damaged file is in the way; the last row gets what the run did after its kill."""
        said = []
        while True:
            before = {stage: steps(self.directory, stage) for stage in STAGES}
            launched = launch(self._config, self.directory, kill)
            for number, each in self.damages.items():
                if number not in self._came and (line := each.named_in(self.directory, launched.text)):
                    self._came[number] = f"said: {line}"
            said += self._resumed(before, launched.text)
            self._nothing_vanished(before)
            if launched.statuses != REFUSED or not self._put_back(launched.text):
                break
            said.append("refused; a file was put back")
        if self.rows and "then" not in self.rows[-1]:
            self.rows[-1]["then"] = ", ".join(said) or "began"
        return launched

    def _put_back(self, text: str) -> bool:
        """Put the damaged files back that an error names; whether there was one."""
        found = [(n, each) for n, each in self.damages.items() if each.lasts(self.directory)]
        found = [(n, each, line) for n, each in found if (line := each.named_in(self.directory, text))]
        for number, each, line in found:
            each.undo(self.directory)
            self._came[number] = f"refused, put back: {line}"
        return bool(found)

    def _resumed(self, before: dict[str, list[int]], text: str) -> list[str]:
        """Where a launch resumed: at the newest checkpoint, unless it says that this one is damaged."""
        found = re.findall(r"^(\w+): resumes at step (\d+)$", text, re.MULTILINE)
        for stage, step in found:
            newer = [each for each in before[stage] if each > int(step)]
            if unsaid := [each for each in newer if f"{stage}: step {each} is damaged" not in text]:
                self.problems.append(f"{stage} resumed at step {step} though there was step {unsaid}")
        began = re.findall(r"^(\w+): \S+ of \S+ parameters trainable", text, re.MULTILINE)
        for stage in set(began) - {stage for stage, _ in found}:
            if before[stage]:
                self.problems.append(f"{stage} began again though there were the steps {before[stage]}")
        return [f"{stage} resumed at step {step}" for stage, step in found]

    def _nothing_vanished(self, before: dict[str, list[int]]) -> None:
        """A checkpoint goes only where newer ones are kept in its place, or where it was damaged."""
        for stage, had in before.items():
            has = steps(self.directory, stage)
            for step in set(had) - set(has):
                damaged = any(each.path.startswith(f"{stage}/checkpoints/{step}/") for each in self.damages.values())
                aside = (self.directory / stage / "checkpoints" / f"{step}.damaged").is_dir()
                if len([each for each in has if each > step]) < KEPT and not (aside and damaged):
                    self.problems.append(f"step {step} of {stage} has vanished; there are {has}")

    def _judge(self, reference: Path) -> None:
        """Compare with the reference; what was damaged, and is so still because nothing read it, is put back first."""
        apart = same_results.differences(self.directory, reference)
        for number, each in self.damages.items():
            if number in self._came:
                if each.kind == "record" and each.path in apart:
                    self._came[number] += f"; not made again: {apart.pop(each.path)}"
            elif each.is_mended(self.directory):
                self._came[number] = "made again"
            elif not each.lasts(self.directory):
                self._came[number] = "the run did not need it, and has replaced or deleted it since"
            else:
                each.undo(self.directory)
                now = same_results.differences(self.directory, reference)
                seen = [text for name, text in apart.items() if name not in now]
                self._came[number] = f"nothing read it; a reader finds: {'; '.join(seen) or 'no difference'}"
                apart = now
        self.problems += [f"{name}: {text}" for name, text in apart.items()]
