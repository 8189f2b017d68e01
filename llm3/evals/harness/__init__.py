"""Tasks of the LM Evaluation Harness (lm-eval), by name or from YAML files of one's own.

lm-eval makes the requests of a task and computes its metrics; the model is llm3's own, on the mesh. Every process runs
lm-eval, with the same seeds and so with the same requests, and computes its part of each batch.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm3.config.schema import EvaluationConfig
from llm3.errors import UserError

if TYPE_CHECKING:
    from llm3.evals import EvalContext

WINDOWS: dict[str, str] = {}
HEAD = ""
CAUSAL = True
BETTER: dict[str, str] = {}
REQUIRES = {"lm_eval": "eval"}


@dataclasses.dataclass(frozen=True)
class Options:
    """tasks: names of tasks, groups or tags. include_path: a folder with YAML files of tasks. num_fewshot: examples
    before each question; None: as the task says (a task that says 0 keeps 0). limit: evaluate only this many documents
    of each task, or, below 1, this share; 0: all. max_gen_toks: max tokens of an answer, where the task names none.
    apply_chat_template: write prompts with the chat template of the run. fewshot_as_multiturn: write the examples as
    turns of their own. system_instruction: a system prompt. bootstrap_iters: resamples for the standard error of a
    metric that is not a mean; 0: no standard errors. confirm_run_unsafe_code: allow tasks that run code which the model
    writes."""

    tasks: tuple[str, ...] = ()
    include_path: str = ""
    num_fewshot: int | None = None
    limit: float = 0.0
    max_gen_toks: int = 256
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str = ""
    bootstrap_iters: int = 1000
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        names = [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"tasks={self.tasks!r}: expected names")
        object.__setattr__(self, "tasks", tuple(names))
        for name, least in (("num_fewshot", 0), ("limit", 0), ("max_gen_toks", 1), ("bootstrap_iters", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{name}={value!r}: expected at least {least}")


def prepare(config: EvaluationConfig, options: Options, template: str) -> dict[str, Any]:
    """Load the tasks with their documents: {"tasks": {name: task}, "groups": ..., "group_map": ...}, as lm-eval does.

    template: the chat template of the run, or "". Raises UserError, with the nearest name for an unknown task.
    """
    from llm3.evals.harness.tasks import load_tasks

    return load_tasks(options, template, config.sequence_length)


def better(prepared: dict[str, Any]) -> dict[str, str]:
    """{metric: "higher" or "lower"} of the loaded tasks."""
    found: dict[str, str] = {}
    for name, task in prepared["tasks"].items():
        filters = [each["name"] for each in task.get_config("filter_list") or [{"name": "none"}]]
        for metric, higher in task.higher_is_better().items():
            found |= {metric_name(name, metric, each): "higher" if higher else "lower" for each in filters}
    return found


def metric_name(task: str, metric: str, filtered: str) -> str:
    """The name of a metric: <task>_<metric>, or <task>_<filter>_<metric> if the answers are filtered."""
    name = f"{task}_{metric}" if filtered == "none" else f"{task}_{filtered}_{metric}"
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in name)


def evaluate(context: "EvalContext") -> dict[str, Any]:
    """Each metric of each task with its standard error, <metric>_stderr, and the number of documents, <task>_items.

    A group that has metrics of its own stands for its tasks; the details `tasks` have all of them, `settings` what they
    depend on. A value that does not apply is None. truncated: the number of requests whose beginning was cut.
    predictions: columns of each task by its name, with which the names of its metrics begin.
    """
    from llm3.evals.harness.language_model import LanguageModel
    from llm3.evals.harness.samples import predictions
    from llm3.evals.harness.tasks import run_tasks

    model = LanguageModel(context)
    found = run_tasks(model, context.prepared, context.options)
    lines, groups = list(_lines(found)), context.prepared["group_map"]
    inside = {name for line in lines for name in groups.get(line["task"], ())}
    result: dict[str, Any] = {}
    for line in lines:
        if line["task"] not in inside:
            name = metric_name(line["task"], line["metric"], line["filter"])
            result |= {name: line["value"], f"{name}_stderr": line["stderr"]}
            result[metric_name(line["task"], "items", line["filter"])] = line["items"]
    settings = {"lm_eval": importlib.metadata.version("lm_eval"), "sequence_length": context.config.sequence_length}
    columns = predictions(found["samples"], lambda task, filtered: metric_name(task, "", filtered).removesuffix("_"))
    return result | {"truncated": model.truncated, "tasks": lines, "settings": settings, "predictions": columns}


def _lines(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics of tasks and groups in lm-eval's results, in plain numbers."""
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "value": number(value),
                    "stderr": number(values.get(f"{metric}_stderr,{filtered}")),
                    "items": values.get("sample_len"),
                    "shots": found["n-shot"].get(task),
                    "version": str(found["versions"].get(task)),
                }


def number(value: Any) -> float | None:
    """A result of lm-eval, which may be a number of numpy's or a text such as "N/A", as a finite float or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
