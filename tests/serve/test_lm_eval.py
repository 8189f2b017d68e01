"""lm-eval's `local-completions` against the server has the scores of the same tasks in the training loop."""

import types

import pytest

from tests.helpers import tiny_serve as tiny
from tests.helpers.tiny_cache import make_context
from tests.helpers.tiny_export import write_run
from tests.helpers.tiny_tasks import CONFIG, MODEL, PARAMS, TOKENIZER, write_tasks

pytest.importorskip("lm_eval", reason="needs pip install 'llm3[clients]'")
pytest.importorskip("tenacity", reason="needs pip install 'llm3[clients]'")

import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from llm3.evals import harness
from llm3.evals.harness.language_model import LanguageModel
from llm3.segments import segmented

TASKS = ["picks", "guesses", "reads", "writes"]
LENGTH = 64


def with_bos(text):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text)] if isinstance(text, str) else [with_bos(each) for each in text]


def evaluated(model, folder) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, log_samples=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_local_completions_have_the_scores_of_the_training_loop(tmp_path, batch):
    write_run(tmp_path / "run", CONFIG, PARAMS, text=TOKENIZER)
    write_tasks(tmp_path)
    options = harness.Options(tasks=tuple(TASKS), include_path=str(tmp_path))
    fields = {"params": segmented(PARAMS, ((0, CONFIG.layers),)), "tokenizer": TOKENIZER, **MODEL}
    context = make_context(harness, None, options=options, length=LENGTH, batch_size=8, **fields)
    expected = evaluated(LanguageModel(context), tmp_path)
    with tiny.Listening([tmp_path / "run"]) as server:
        client = LocalCompletionsAPI(
            f"{server.url}/v1/completions", "None", model="adapt", max_length=LENGTH + 2, batch_size=batch,
            eos_string="<|eos|>", custom_prefix_token_id=TOKENIZER.prefix_id,
        )  # fmt: skip
        # the tokenizer as transformers would give it, which is not needed here
        client.tokenizer = types.SimpleNamespace(encode=with_bos, eot_token=TOKENIZER.eos_id)
        client.tokenizer_backend, client.tokenized_requests = "tiktoken", True
        found = evaluated(client, tmp_path)
        assert server.engine.counts["failed"] == 0
    for task in TASKS:
        for one, other in zip(expected["samples"][task], found["samples"][task], strict=True):
            assert _numbers(other["resps"]) == pytest.approx(_numbers(one["resps"]), rel=1e-4, abs=1e-4)
            assert _texts(other["resps"]) == _texts(one["resps"])
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def _flat(value) -> list:
    return [each for part in value for each in _flat(part)] if isinstance(value, list | tuple) else [value]


def _numbers(responses) -> list[float]:
    return [each for each in _flat(responses) if isinstance(each, float)]


def _texts(responses) -> list:
    """Texts, and whether a continuation is the likeliest one."""
    return [each for each in _flat(responses) if not isinstance(each, float)]
