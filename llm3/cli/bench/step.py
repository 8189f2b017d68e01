"""A stage's step, compiled and timed."""

import statistics
import time
from typing import Any, NamedTuple

import jax

from llm3.data.batch import Batch
from llm3.distributed.sharding import place_batch
from llm3.models.cross_entropy import blocks
from llm3.models.transformer import init
from llm3.stages.cost import byte_report
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import size

WARM_UP = 2  # steps that are not counted


class Fed(NamedTuple):
    """A batch on the host and on the devices."""

    host: Batch
    placed: Any


def fed(session: Session, stage: Stage, number: int) -> Fed:
    """The stage's batch of a step, ready on the devices."""
    host = stage.data.mixture.batch(number, range(stage.config.batch_size))
    return Fed(host, jax.block_until_ready(place_batch(session.mesh, host)))


class BenchStep:
    """A phase's compiled step, its state, and the wall time of each step."""

    def __init__(self, session: Session, stage: Stage, phase: Phase):
        self._session, self._stage, self._phase = session, stage, phase
        before = time.perf_counter()
        self._compiled = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(session.mesh)).compile()
        self.compile_seconds = time.perf_counter() - before
        self._seconds: list[float] = []
        self._state: Any = None

    @property
    def seconds(self) -> list[float]:
        """The wall time of each step after the warm-up."""
        return self._seconds[WARM_UP:]

    @property
    def device_bytes(self) -> int:
        """Bytes of a device that the compiler counts: arguments, and what is held besides at the peak."""
        memory = self._compiled.memory_analysis()
        assert memory is not None  # XLA reports memory on all supported devices
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def text(self) -> str:
        """The compiled program, as HLO."""
        return self._compiled.as_text() or ""

    def run(self, batch: Fed) -> None:
        """Run one step, and time it from the call until all results are ready."""
        if self._state is None:
            params = init(self._phase.model, self._session.experiment.init_seed, self._session.mesh)
            self._state = jax.block_until_ready(self._phase.state(params))
        before = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._compiled(self._state, batch.placed))
        self._seconds.append(time.perf_counter() - before)

    def follow(self, batch: Any) -> None:
        """Run one step on a batch on the devices, untimed."""
        self._state, _ = jax.block_until_ready(self._compiled(self._state, batch))

    def metrics(self, peak: float) -> dict[str, float | int | None]:
        """peak: FLOP/s of all devices together, of which mfu and hfu are shares."""
        phase, timed = self._phase, self.seconds
        median, memory = statistics.median(timed), self._compiled.memory_analysis()
        assert memory is not None
        stored = byte_report(phase.abstract_state)
        return {
            "step_seconds": median,
            "step_seconds_min": min(timed),
            "step_seconds_max": max(timed),
            "tokens_per_second": self._stage.step_tokens / median,
            "flops_per_step": phase.flops_per_step,
            "hardware_flops_per_step": phase.hardware_flops_per_step,
            "compiler_flops": self._compiler_flops(),
            "model_flops_per_second": phase.flops_per_step / median,
            "mfu": phase.flops_per_step / median / peak,
            "hfu": phase.hardware_flops_per_step / median / peak,
            "compile_seconds": self.compile_seconds,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "opt_bytes": stored["moment_bytes"],
            "gradient_bytes": stored["gradient_bytes"],
            "params": size(phase.abstract_params),
            "trainable_params": size(phase.abstract_state.trainable),
        }

    def _compiler_flops(self) -> float | None:
        """The compiler's count, with element-wise work; None if it counts one loop iteration or one device."""
        model = self._phase.model
        exact = model.scan_unroll >= model.layers and blocks(model.padded_vocab_size, model.vocab_block)[0] == 1
        exact = exact and self._stage.config.micro_batches == 1 and jax.device_count() == 1
        analysis = self._compiled.cost_analysis() if exact else None
        return None if analysis is None else analysis["flops"]
