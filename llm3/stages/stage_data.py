"""The training data of a stage: its sources, their weights over the steps, and the mixture of batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llm3.config.schema import RunConfig, StageConfig
from llm3.data.cache.token_cache import TokenCache
from llm3.data.library import Library
from llm3.data.mixture import Mixture
from llm3.data.packing import Windows
from llm3.errors import counted
from llm3.stages.mixture_schedule import drawn_sources, replayed_weights, schedule_of_history
from llm3.stages.truncation import truncation_warning


class StageData(NamedTuple):
    """The training data of a stage by source, the mixture weights by first step, and the mixture of batches.

    length: tokens of a document that a window holds. replayed: the weights of the parent's data, if it is replayed
    """

    caches: dict[str, TokenCache]
    tables: dict[str, Windows]
    schedule: list[tuple[int, dict[str, float]]]
    mixture: Mixture
    length: int
    replayed: Mapping[str, float] | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """{source: digest of its content}"""
        return {source: tokens.fingerprint for source, tokens in self.caches.items()}

    def warnings(self, field: str) -> list[str]:
        """A sentence for each source of which much does not fit into the windows. field: where their length is set."""
        found = (
            truncation_warning(table, self.caches[source], source, self.length, field)
            for source, table in self.tables.items()
        )
        return [each for each in found if each]

    def facts(self, steps: int) -> dict[str, list[str]]:
        """For each source, phrases on its size, its packing, and how many epochs `steps` steps are."""
        epochs, facts = self.mixture.epochs(steps), {}
        for source, table in self.tables.items():
            tokens = self.caches[source]
            lost = [f"{table.truncated:,} of them truncated to a window"] if table.truncated else []
            lost += [f"{table.dropped:,} dropped: no target fits into a window"] if table.dropped else []
            lost += [f"{counted(sum(tokens.bad.values()), 'bad row')} set aside"] if tokens.bad else []
            facts[source] = [", ".join([counted(tokens.documents, "document"), *lost])]
            facts[source] += [counted(len(table), "window"), f"{100 * table.waste:.1f} % padding"]
            facts[source].append(f"{epochs[source]:.2g} epochs")
        return facts


def read_data(
    config: RunConfig,
    name: str,
    library: Library,
    kinds: Mapping[str, str],
    length: int,
    seed: int,
    corrupt: Callable | None,
    history: Sequence[tuple[int, StageConfig]],
    replayed: Mapping[str, float] | None = None,
) -> StageData:
    """The data of stage `name`, tokenized and packed. Raises UserError.

    kinds: {row format: kind of windows}. length: tokens of a document that a window holds. seed: of the data order.
    corrupt: what the objective does to each batch; None: nothing. history: of a `Stage`.
    replayed: the weights of the parent's data when the stage began; None: it has not begun.
    """
    stage, where = config.stages[name], f"config.stages.{name}"
    replayed = replayed or replayed_weights(config, stage, library, where)
    schedule = schedule_of_history(config, name, library, history, replayed)
    sources = drawn_sources(config, name, schedule)
    caches = {source: library.cache(source, "train") for source in sources}
    tables = {
        source: library.windows(kinds[config.sources[source].row_format], source, "train", length) for source in sources
    }
    sizes = [(first, own.batch_size) for first, own in history]
    mixture = Mixture(
        tables,
        schedule,
        sizes[0][1],
        seed,
        by=stage.weights,
        corrupt=corrupt,
        sizes=sizes[1:],
        skip=[(first - 1, last - first + 1) for first, last in stage.skip_steps],
    )
    return StageData(caches, tables, schedule, mixture, length, replayed)
