"""`bench --decode --peer=torch`: the same prompts answered by transformers' `generate`, greedily, with its cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers

from llm3.cli.bench.torch_peer import PeerModel
from llm3.stages.stage import Stage
from llm3.training.phase import Phase


class TorchDecoding:
    """A model of the same shape, with random parameters of its own, in the same dtype. about: sizes and versions."""

    def __init__(self, stage: Stage, phase: Phase):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        dtype = getattr(torch, stage.model.compute_dtype)
        self._model = PeerModel(stage, phase).inner.to(self._device, dtype).eval()
        threads = f", {torch.get_num_threads()} threads" if self._device.type == "cpu" else ""
        self.about = f"torch {torch.__version__}, transformers {transformers.__version__}, {self._device.type}{threads}"

    def answering(self, prompts: np.ndarray, limits: Sequence[int], rows: int) -> Callable[[], object]:
        """A function that answers the first len(limits) prompts, int32 [B, T], `rows` at a time.

        A batch goes on until its longest answer is complete. No token ends an answer.
        """
        batches = [limits[first : first + rows] for first in range(0, len(limits), rows)]
        tokens = torch.from_numpy(prompts[: len(limits)].astype(np.int64)).to(self._device).split(rows)

        def answer() -> object:
            return [self._generated(each, max(counts)).cpu() for each, counts in zip(tokens, batches, strict=True)]

        return answer

    def _generated(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        exactly = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            made = self._model.generate(tokens, attention_mask=torch.ones_like(tokens), **exactly)
        assert made.shape == (len(tokens), tokens.shape[1] + count)
        return made
