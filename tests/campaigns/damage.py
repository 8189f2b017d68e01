"""A file of a run that is truncated, missing, or has a flipped bit, and how it is put back."""

import random
import re
from pathlib import Path
from typing import NamedTuple

HARMS = ("truncated", "missing", "flipped")
# The newest checkpoints are what a run reads; its records and the token cache it checks at each start.
KINDS = {
    "checkpoint": r"\w+/(checkpoints|base)/\d+/.*",
    "cache": r"cache/(tokens-\w+/.*|tokenizer-.*|contamination-.*|digests\.json)",
    "record": r"\w+/(config|data_sample|details|evaluation)\.json|\w+/(metrics|samples)\.jsonl"
    r"|\w+/predictions/.*|(matrix|config\.resolved)\.json|tokenizer\.json",
}
ORDER = ("checkpoint", "record", "checkpoint", "cache")


class Damage(NamedTuple):
    """What was done to a file. path: relative to the folder of the run. before: its bytes; after: None if missing."""

    kind: str
    harm: str
    path: str
    before: bytes
    after: bytes | None

    def __str__(self) -> str:
        return f"{self.harm} {self.path}"

    def undo(self, directory: Path) -> None:
        """Put the file back as it was."""
        (directory / self.path).write_bytes(self.before)

    def lasts(self, directory: Path) -> bool:
        """Whether the file is still as the damage left it, in a folder that is still there."""
        path = directory / self.path
        return path.parent.is_dir() and _content(path) == self.after

    def is_mended(self, directory: Path) -> bool:
        """Whether the file is as it was before."""
        return _content(directory / self.path) == self.before

    def named_in(self, directory: Path, text: str) -> str | None:
        """The first line of a text that names the file, or the checkpoint or the entry of the cache that it is in."""
        path = directory / self.path
        owner = re.match(r"\w+/(checkpoints|base)/\d+|cache/tokens-\w+", self.path)
        names = [str(path), *([str(directory / owner[0])] if owner else [])]
        pattern = "|".join(rf"{re.escape(name)}(?!\w)" for name in names)
        return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), None)


def do(directory: Path, number: int, pick: random.Random) -> Damage | None:
    """Damage a file of the run in `directory`; of what kind and how follows from the number of damages before it.

    None: there is no file of that kind yet.
    """
    wanted, harm = ORDER[number % len(ORDER)], HARMS[number % len(HARMS)]
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    for kind in (wanted, *(each for each in KINDS if each != wanted)):
        found = [name for name, path in files.items() if re.fullmatch(KINDS[kind], name) and path.stat().st_size]
        if kind == "checkpoint" and found:  # one that is read next, and more than its many small files
            newest = max((files[name].stat().st_mtime_ns, name.split("/")[:3]) for name in found)[1]
            found = [name for name in found if name.split("/")[:3] == newest]
            found = pick.choice([found, sorted(found, key=lambda name: files[name].stat().st_size)[-4:]])
        if found:
            return _harm(directory, kind, harm, pick.choice(found), pick)
    return None


def _harm(directory: Path, kind: str, harm: str, name: str, pick: random.Random) -> Damage:
    path = directory / name
    before = path.read_bytes()
    place, bit = pick.randrange(len(before)), pick.randrange(8)
    flipped = bytes([*before[:place], before[place] ^ (1 << bit), *before[place + 1 :]])
    after = {"truncated": before[:place], "missing": None, "flipped": flipped}[harm]
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return Damage(kind, harm, name, before, after)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
