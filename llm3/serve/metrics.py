"""What the server counts, as text that Prometheus reads."""

import collections
import threading

from llm3.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # upper bounds of the histogram
TYPE = "text/plain; version=0.0.4"
FINISHES = ("stop", "length", "cancelled", "late", "failed")


class Metrics:
    """Counts of the responses, by path and status, and of their seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._responses: collections.Counter[tuple[str, int]] = collections.Counter()
        self._within: collections.Counter[tuple[str, float]] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def add(self, path: str, status: int, seconds: float) -> None:
        """Count a response that is complete. path: one of a few."""
        with self._lock:
            self._responses[path, status] += 1
            self._seconds[path] += seconds
            for bound in SECONDS:
                self._within[path, bound] += seconds <= bound

    def text(self, engine: Engine) -> str:
        """All metrics, with those of the engine."""
        lines: list[str] = []

        def metric(name: str, kind: str, what: str, values: dict[str, int]) -> None:
            lines.extend([f"# HELP llm3_{name} {what}", f"# TYPE llm3_{name} {kind}"])
            lines.extend(f"llm3_{name}{labels} {value}" for labels, value in values.items())

        counts = engine.counts
        metric("requests_total", "counter", "Requests that the engine took.", {"": counts["requests"]})
        ends = {f'{{finish="{each}"}}': counts[each] for each in FINISHES}
        metric("answers_total", "counter", "Answers by the reason that they ended.", ends)
        metric("prompt_tokens_total", "counter", "Tokens of prompts.", {"": counts["prompt_tokens"]})
        metric("tokens_total", "counter", "Tokens of answers.", {"": counts["tokens"]})
        metric("waiting", "gauge", "Requests that wait for a row of a batch.", {"": engine.waiting})
        metric("active", "gauge", "Requests that are in a batch.", {"": engine.active})
        with self._lock:
            served = {f'{{path="{p}",status="{s}"}}': n for (p, s), n in sorted(self._responses.items())}
            metric("responses_total", "counter", "Responses by path and status.", served)
            lines.extend(self._histogram())
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        name = "llm3_response_seconds"
        lines = [f"# HELP {name} Seconds from a request to the end of its response.", f"# TYPE {name} histogram"]
        for path in sorted(self._seconds):
            count = sum(n for (of, _), n in self._responses.items() if of == path)
            lines += [f'{name}_bucket{{path="{path}",le="{b}"}} {self._within[path, b]}' for b in SECONDS]
            lines.append(f'{name}_bucket{{path="{path}",le="+Inf"}} {count}')
            lines += [
                f'{name}_sum{{path="{path}"}} {self._seconds[path]:.6f}',
                f'{name}_count{{path="{path}"}} {count}',
            ]
        return lines
