"""Records that come from a list, for tests of the token cache; other processes can read them too."""

import dataclasses
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from llm3.data import tokenizer
from llm3.data.cache import cache
from llm3.data.formats import BadRow

TEXTS = [f"document {i} says {'so ' * (i % 7)}é" for i in range(60)]
trained = tokenizer.train(TEXTS, 300)


@dataclasses.dataclass(frozen=True)
class ListRecords:
    """Parts of records. slow: the part before which `read` waits for the file `gate`; or, with gate="die", dies."""

    batches: tuple[tuple[Any, ...], ...]
    name: str = "fake"
    split: str = "train"
    slow: int = -1
    gate: str = ""

    @property
    def key(self) -> str:
        content = [[str(r) if isinstance(r, BadRow) else r for r in batch] for batch in self.batches]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @property
    def texts_key(self) -> str:
        """That of the same records without labels."""
        return dataclasses.replace(self, batches=tuple(map(without_labels, self.batches))).key

    def why_empty(self) -> str:
        return "it has no rows"

    def parts(self) -> list[int]:
        return list(range(len(self.batches)))

    def read_part(self, part):
        if part == self.slow and self.gate == "die":
            os._exit(1)
        if part == self.slow:
            Path(self.gate + ".reached").touch()
            while not os.path.exists(self.gate):
                time.sleep(0.01)
        first = sum(map(len, self.batches[:part]))
        yield from enumerate(self.batches[part], start=first)


def without_labels(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Records without their labels."""
    return tuple(
        each if isinstance(each, BadRow) else {name: value for name, value in each.items() if name != "labels"}
        for each in batch
    )


def texts_in_parts(*batches: list[str]) -> ListRecords:
    return ListRecords(tuple(tuple({"text": text} for text in batch) for batch in batches))


def numbered(parts: int, documents: int = 20) -> ListRecords:
    """Some parts of documents, no two alike."""
    return texts_in_parts(*([f"{part} {i} " + "word " * (i % 5) for i in range(documents)] for part in range(parts)))


def contents(built: cache.TokenCache) -> list[str]:
    return [trained.decode(built.document(i)) for i in range(built.documents)]


def files(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their names."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


if __name__ == "__main__":  # a build that waits in its part `slow`, to be killed there
    directory, gate, slow, workers = sys.argv[1:]
    records = dataclasses.replace(numbered(4), slow=int(slow), gate=gate)
    cache.build_cache(records, "text", trained, Path(directory), workers=int(workers))
