"""Which run works on what in a workdir.

A run holds the lock of each stage that it is to train, until that is finished. The lock of the workdir itself is held
for moments: while stages are taken, and while files that all runs share are read and written again. The first of
several processes holds both.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from pathlib import Path

from llm3.checkpoints.commit import saved_steps
from llm3.config.schema import RunConfig
from llm3.distributed import processes
from llm3.distributed.lock import Holder, holder, lock
from llm3.distributed.watchdog import Watchdog
from llm3.errors import UserError
from llm3.files import CHECKPOINTS, INIT, ROW
from llm3.handoff.start import NAMED_STEPS, Start, read_start


@contextmanager
def row_held(workdir: Path, name: str, watchdog: Watchdog) -> Iterator[None]:
    """Hold a row that is measured, in all processes, once no other run does: look again whether it is there."""
    watchdog.rest()  # another run may measure for hours
    with processes.held_by_first(lambda: lock(workdir / name, inf)):
        watchdog.at(0, "loading")
        yield


class StageLocks:
    """The stages of a workdir that this process holds, all of which it releases in the end.

    In the end, a workdir that did not exist before, and holds nothing else, is removed.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._is_new = workdir, not workdir.exists()
        self._held: dict[str, ExitStack] = {}

    def __enter__(self) -> "StageLocks":
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self._held]:
            self.release(name)
        if self._is_new and processes.is_first() and self._workdir.is_dir():
            with suppress(UserError), lock(self._workdir, remove=True):
                pass

    def take(self, names: Iterable[str]) -> None:
        """Take stages. Raises InUse if another process holds one of them, and as `lock`."""
        for name in names:
            with ExitStack() as held:
                held.enter_context(lock(self._workdir / name))
                self._held[name] = held.pop_all()

    def release(self, name: str) -> None:
        """Release a stage, if this process holds it."""
        if name in self._held:
            self._held.pop(name).close()


def check_parents(config: RunConfig, workdir: Path, names: list[str]) -> None:
    """Raise UserError if another run trains what one of these stages starts from, if that is not one of them.

    A step that the config names is saved already. A stage with checkpoints of its own needs no other run any more.
    """
    for name in names:
        where = f"config.stages.{name}.start"
        start = read_start(config.stages[name].start, workdir, where)
        if not isinstance(start, Start) or start.stage == INIT or start.step not in NAMED_STEPS:
            continue
        own = start.run.resolve() == workdir.resolve()
        if (own and start.stage in names) or (not own and saved_steps(workdir / name / CHECKPOINTS)):
            continue
        if found := trained_by(start.run / start.stage):
            raise UserError(
                f"{where}: {start.title} is trained by {found}: wait until it is finished, or name a step that it has "
                f"saved (start=dict(stage={start.stage!r}, step=N))"
            )


def trained_by(stage: Path) -> Holder | None:
    """The process that trains a stage; None if none does: who holds a finished one evaluates it again."""
    return None if (stage / ROW).is_file() else holder(stage)
