"""Tasks of lm-eval: found, loaded with their documents, and run, without its progress bars and without git.

`lm_eval.simple_evaluate` calls git and describes the machine; its parts that decide results are called here instead,
with its own seeds, so that few-shot examples are those of lm-eval's command line.
"""

import contextlib
import functools
import io
import logging
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from llm3.errors import UserError, closest, counted, listed, root_cause
from llm3.evals.harness.requests import answering
from llm3.files import local_path

if TYPE_CHECKING:
    from llm3.evals.harness import Options

SEED, OTHER_SEED = 0, 1234  # lm-eval's defaults: of Python's random module, and of all else


def load_tasks(options: "Options", template: str, sequence_length: int) -> dict[str, Any]:
    """The tasks of the options, as `prepare` of the plugin describes it. Raises UserError."""
    if not options.tasks:
        raise UserError("tasks: expected at least one name, as in tasks=['arc_easy']")
    if options.apply_chat_template and not template:
        raise UserError("apply_chat_template: the model has no chat template; expected config.tokenizer.chat_template")
    with quiet():
        manager = _task_manager(options)
    try:
        with quiet():
            loaded = manager.load(list(options.tasks))
    except Exception as error:  # the libraries that read a task and its documents may raise anything
        raise UserError(f"tasks: {listed(options.tasks)} cannot be loaded: {root_cause(error)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
            raise UserError(f"tasks: {name!r} runs code that the model writes; expected confirm_run_unsafe_code=True")
        if task.OUTPUT_TYPE == "generate_until":
            _check_generation(name, task.get_config("generation_kwargs") or {}, options.max_gen_toks, sequence_length)
        shots = task.get_config("num_fewshot")
        if options.num_fewshot is not None and shots != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif shots is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _task_manager(options: "Options") -> Any:
    """lm-eval's index of tasks: of the include_path alone if it has them all, since the others take seconds to read."""
    from lm_eval.tasks import TaskManager

    own, folder = None, None
    if options.include_path:
        folder = local_path(options.include_path, "include_path")
        if not folder.is_dir():
            raise UserError(
                f"include_path={options.include_path!r}: no such folder; expected YAML files of tasks in it"
            )
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(options.tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in options.tasks:
        if name not in manager.all_tasks:
            there = f"{folder} has {listed(own.all_tasks) or 'none'}" if own else "tasks of your own need include_path"
            raise UserError(
                f"tasks: {name!r}: no such task; {closest(name, manager.all_tasks)}"
                f"lm-eval has {len(manager.all_tasks) - (len(own.all_tasks) if own else 0):,} names, and {there}"
            )
    return manager


def _check_generation(name: str, settings: dict[str, Any], default: int, sequence_length: int) -> None:
    """Raise UserError for a task whose answers cannot be generated as it says."""
    if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature")):
        raise UserError(f"tasks: {name!r} samples its answers (do_sample); expected a task with do_sample: false")
    if (most := answering(settings, default).tokens) >= sequence_length:
        raise UserError(
            f"tasks: {name!r} generates up to {counted(most, 'token')}: expected sequence_length above that, "
            f"not {sequence_length}, or a smaller max_gen_toks"
        )


def run_tasks(model: Any, loaded: dict[str, Any], options: "Options") -> dict[str, Any]:
    """The results of lm-eval for loaded tasks. model: an `lm_eval.api.model.LM`."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():  # an earlier evaluation has drawn from it
        task.set_fewshot_seed(seed=OTHER_SEED)
    with quiet(), seeded():
        return evaluate(
            lm=model,
            task_dict=loaded,
            limit=options.limit or None,
            bootstrap_iters=options.bootstrap_iters,
            log_samples=True,
            system_instruction=options.system_instruction or None,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, prints and warnings of lm-eval, and without forks, which jax does not survive."""
    from tqdm import tqdm

    logger, bar, forks = logging.getLogger("lm_eval"), tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    tqdm.__init__ = functools.partialmethod(bar, disable=True)
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = bar
        logger.setLevel(level)
        del os.environ["DISABLE_MULTIPROC"]
        if forks is not None:
            os.environ["DISABLE_MULTIPROC"] = forks


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The global random states as lm-eval seeds them, and afterwards as they were before."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
