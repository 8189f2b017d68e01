"""`bench --peer=torch`: the same step by transformers and torch, with SDPA and the fused AdamW.

The model has the same shape, trains the same parameters, and reads the same batches; it computes in the same dtype. It
attends to all earlier positions, also of other documents of a window: masks for documents would cost it the fast path
of SDPA. So it has rather less to do. Nothing is shared with llm3's parameters: both begin with random ones.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers

from llm3.cli.bench.step import WARM_UP, Fed
from llm3.config.model_schema import ModelConfig
from llm3.data.batch import Batch
from llm3.errors import UserError
from llm3.interop.adapters import adapter_json, modules_of
from llm3.interop.family import family_of_model, load_family
from llm3.interop.names import model_places
from llm3.interop.write import config_json
from llm3.segments import locate
from llm3.stages.stage import Stage
from llm3.training.phase import Phase

LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern")
IN_PEFT, WRAPPED = "base_model.model.", ".base_layer"  # what PEFT adds to the names of a model


class TorchStep:
    """A stage's step by torch, and the wall time of each step. compiles: by torch.compile.

    Raises UserError for a stage that has no counterpart.
    """

    def __init__(self, stage: Stage, phase: Phase, compiles: bool = False):
        _check(stage)
        self._stage, self._device = stage, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = getattr(torch, stage.model.compute_dtype)
        torch.manual_seed(0)
        model = PeerModel(stage, phase).to(self._device)
        if stage.config.frozen == "compute":
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(self._dtype)
        self._params = [each for each in model.parameters() if each.requires_grad]
        self._total = sum(each.numel() for each in model.parameters())
        self._name, self._compiles = "torch.compile" if compiles else "torch", compiles
        self._loss: Callable = torch.compile(model) if compiles else model
        self._optimizer = _adamw(stage, self._params)
        self._seconds: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """The wall time of each step after the warm-up."""
        return self._seconds[WARM_UP:]

    def run(self, batch: Fed) -> None:
        """Run one step, and time it from the call until the parameters are updated."""
        parts = [_on(each, self._device) for each in _micro_batches(batch.host, self._stage.config.micro_batches)]
        weight = float(batch.host.weights.sum()) or 1.0
        self._wait()
        before = time.perf_counter()
        try:
            self._step(parts, weight)
        except Exception as error:
            if not self._compiles or self._seconds:
                raise
            raise UserError(f"--peer={self._name}: {type(error).__name__}: {str(error).strip()[:300]}") from error
        self._wait()
        self._seconds.append(time.perf_counter() - before)

    def _step(self, parts: list[tuple], weight: float) -> None:
        reduced = self._dtype != torch.float32
        for part in parts:
            with torch.autocast(self._device.type, self._dtype) if reduced else nullcontext():
                loss = self._loss(*part) / weight
            loss.backward()
        if self._stage.config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._params, self._stage.config.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def facts(self) -> dict[str, Any]:
        """What was compared: sizes, versions and threads."""
        threads = f", {torch.get_num_threads()} threads" if self._device.type == "cpu" else ""
        trained = sum(each.numel() for each in self._params)
        about = f"torch {torch.__version__}, transformers {transformers.__version__}, {self._device.type}{threads}"
        return {"params": self._total, "trainable_params": trained, "about": about}


class PeerModel(torch.nn.Module):
    """The model of a stage by transformers, with the sum of a micro-batch's losses as its result."""

    def __init__(self, stage: Stage, phase: Phase):
        super().__init__()
        shape = peer_shape(stage.model)
        plugin = load_family(family_of_model(shape))
        described = config_json(plugin, shape, stage.config.sequence_length, (), False)
        config = transformers.AutoConfig.for_model(**described)
        auto = transformers.AutoModelForCausalLM if shape.causal else transformers.AutoModelForMaskedLM
        inner = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        if stage.model.remat != "none":
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = trained_tensors(stage.model, phase, plugin)
        self.inner = with_adapters(inner, stage.model, plugin)
        for name, parameter in self.inner.named_parameters():
            own = name.removeprefix(IN_PEFT).replace(WRAPPED, "")
            parameter.requires_grad_(own in trained or "lora_" in name)
        self.head = None
        if stage.head == "task":
            # the LM head has no part in the loss
            self.inner = self.inner if stage.model.adapters else inner.base_model
            self.head = torch.nn.Linear(shape.d_model, stage.model.classes)
            self.head.requires_grad_(any(path.startswith("head/") for path in phase.partition.trainable))
        self._positions, self._causal = stage.model.max_output_positions, shape.causal

    def forward(self, tokens: Any, targets: Any, weights: Any) -> Any:
        """The weighted sum of the cross-entropies in nats. All: [B, T]."""
        inputs = {"input_ids": tokens} | ({"use_cache": False} if self._causal else {})
        if self.head is None:
            logits = self.inner(**inputs).logits
        else:
            hidden = self._hidden(inputs)
            if self._positions:  # where documents have their labels
                at = weights.topk(self._positions, dim=1).indices
                hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
                targets, weights = targets.gather(1, at), weights.gather(1, at)
            logits = self.head(hidden)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (nats * weights.flatten()).sum()

    def _hidden(self, inputs: dict[str, Any]) -> Any:
        inner = getattr(self.inner, "base_model", self.inner)
        inner = getattr(inner, "model", inner)  # of PEFT's model
        return getattr(inner, "base_model", inner)(**inputs).last_hidden_state


def peer_shape(model: ModelConfig) -> ModelConfig:
    """The model without adapters and task head, and with all rows of its vocabulary, those of the padding too."""
    plain = replace(model, adapters=(), classes=0, pooler=False, max_output_positions=0)
    return replace(plain, vocab_size=model.padded_vocab_size, vocab_multiple=1)


def _check(stage: Stage) -> None:
    """Raise UserError for a stage that has no counterpart."""
    config = stage.config
    if stage.objective.HEAD not in ("", "labels") or stage.task.label_sets is not None:
        raise UserError(f"--peer=torch: the objective {config.objective_name!r} has no counterpart there")
    if config.optimizer.name != "adamw":
        raise UserError(f"--peer=torch: expected adamw, not {config.optimizer.name}: {stage.where}.optimizer.name")
    if config.frozen not in ("float32", "compute"):
        raise UserError(f"--peer=torch: {stage.where}.frozen={config.frozen!r} has no counterpart there")
    if len(stage.model.adapters) > 1:
        raise UserError(f"--peer=torch: expected at most one adapter: {stage.where}.adapters")


def trained_tensors(model: ModelConfig, phase: Phase, plugin: ModuleType) -> set[str]:
    """The names, as transformers has them, of the tensors whose leaves the phase trains."""
    places = model_places(plugin, peer_shape(model))
    found = set()
    for path, layers in map(locate, phase.partition.trainable):
        if path in places:
            found |= {places[path].named(layer) for layer in layers or (0,)}
    return found


def with_adapters(inner: Any, model: ModelConfig, plugin: ModuleType) -> Any:
    """The model with PEFT's adapters in the places of the stage's."""
    for name, adapter in model.adapters:
        import peft

        plain = replace(model, adapters=())
        written = adapter_json(adapter, modules_of(plugin, plain, name, adapter), plugin, plain, None, False)
        kept = {key: value for key, value in written.items() if key in LORA}
        inner = peft.get_peft_model(inner, peft.LoraConfig(**kept))
    return inner


def _adamw(stage: Stage, params: list[Any]) -> Any:
    own = stage.config.optimizer
    betas = own.options.get("b1", 0.9), own.options.get("b2", 0.999)
    decay = {"weight_decay": own.weight_decay, "eps": own.options.get("eps", 1e-8)}
    return torch.optim.AdamW(params, lr=own.learning_rate, betas=betas, fused=True, **decay)


def _micro_batches(batch: Batch, count: int) -> list[Batch]:
    return [Batch(*(np.asarray(field)[start::count] for field in batch)) for start in range(count)]


def _on(batch: Batch, device: Any) -> tuple:
    put = lambda array, dtype: torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)  # noqa: E731
    return put(batch.tokens, torch.long), put(batch.targets, torch.long), put(batch.weights, torch.float32)
