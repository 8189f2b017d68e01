"""The implementations of attention, what each can do, and which one a call uses."""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax

from llm3.errors import UserError

FEW_SCORES = {"cpu": 1024 * 1024}  # of a row and head: up to so many are held at once
FEW_SCORES_ELSEWHERE = 512 * 512


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call before it is compiled.

    platform: "cpu", "gpu" or "tpu". dtype: the compute dtype. See `Pattern` and `ModelConfig` for the others.
    """

    platform: str
    queries: int
    keys: int
    causal: bool
    prefix: bool
    window: int
    softcap: float
    in_order: bool
    head_dim: int
    dtype: str


def _plain(call: Call) -> str:
    most = FEW_SCORES.get(call.platform, FEW_SCORES_ELSEWHERE)
    return _first((call.queries * call.keys > most, f"more than {most:,} scores in a head and row"))


def _splash(call: Call) -> str:
    from llm3.models.attention.splash import LANES

    return _first(
        (call.prefix, "no prefixes"),
        (not call.in_order, "only queries that are the keys"),
        (call.queries % LANES > 0, f"only lengths that are multiples of {LANES}"),
    )


def _pallas(call: Call) -> str:
    from llm3.models.attention.gpu_pallas import BLOCK

    return _first(
        (call.prefix, "no prefixes"),
        (call.window > 0, "no windows"),
        (call.softcap > 0, "no soft cap"),
        (not call.in_order, "only queries that are the keys"),
        (call.queries % BLOCK > 0, f"only lengths that are multiples of {BLOCK}"),
    )


def _tokamax(call: Call) -> str:
    return _first(
        (importlib.util.find_spec("tokamax") is None, "only machines with tokamax (pip install 'llm3[tokamax]')"),
        (call.prefix, "no prefixes"),
        (not call.in_order, "only queries that are the keys"),
    )


def _cudnn(call: Call) -> str:
    from llm3.models.attention import gpu_cudnn

    return _first(
        (call.prefix, "no prefixes"),
        (call.window > 0 and not call.causal, "windows of causal models only"),
        (call.softcap > 0, "no soft cap"),
        (not call.in_order, "only queries that are the keys"),
        (call.head_dim % 8 > 0 or call.head_dim > 256, "only head dims that are multiples of 8, up to 256"),
        (call.dtype == "float32", "only bfloat16"),
        (not gpu_cudnn.runs_here(), "only Hopper and later NVIDIA GPUs, with cuDNN (pip install 'llm3[cuda]')"),
    )


def _first(*reasons: tuple[bool, str]) -> str:
    return next((reason for applies, reason in reasons if applies), "")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """module: that of its `attend`, imported when it is used. platform: where it runs; "": everywhere.

    lacks: why it cannot serve a call on this platform, "" if it can. automatic: whether "auto" may choose it.
    """

    module: str
    platform: str
    note: str
    lacks: Callable[[Call], str]
    automatic: bool = True

    def cannot(self, call: Call) -> str:
        """Why it cannot serve a call, "" if it can."""
        elsewhere = self.platform not in ("", call.platform)
        return f"only {self.platform.upper()}s" if elsewhere else self.lacks(call)


# the first that can serve a call is used; what nobody has seen running on its device, only where a config names it
IMPLEMENTATIONS = {
    "plain": Implementation("plain", "", "holds all scores, which are few", _plain),
    "splash": Implementation("splash", "tpu", "a Pallas kernel for TPUs", _splash),
    "pallas": Implementation("gpu_pallas", "gpu", "a Pallas kernel for NVIDIA GPUs", _pallas),
    "tokamax": Implementation("gpu_tokamax", "gpu", "kernels for Hopper and Blackwell", _tokamax, automatic=False),
    "cudnn": Implementation("gpu_cudnn", "gpu", "cuDNN's packed form, for Hopper and later", _cudnn, automatic=False),
    "blockwise": Implementation("blockwise", "", "in XLA, with memory linear in the length", lambda call: ""),
}


def choose(call: Call, asked: str = "auto") -> str:
    """The name of the implementation that serves a call. asked: its name, or "auto".

    Raises UserError if the one that was asked for cannot.
    """
    if asked == "auto":
        return next(name for name, each in IMPLEMENTATIONS.items() if each.automatic and not each.cannot(call))
    if why := why_not(asked, call):
        able = [name for name, each in IMPLEMENTATIONS.items() if not each.cannot(call)]
        raise UserError(f"config.model.attention={asked!r} serves {why}; possible here: {', '.join(able)}")
    return asked


def why_not(name: str, call: Call) -> str:
    """Why an implementation cannot serve a call where a config names it, "" if it can; plain holds any scores."""
    return "" if name == "plain" else IMPLEMENTATIONS[name].cannot(call)


def explained(call: Call, asked: str = "auto") -> str:
    """What serves a call, and why the kernel of this platform does not, if there is one."""
    name = choose(call, asked)
    if asked != "auto":
        return f"{name} (as config.model.attention says)"
    automatic = {other: each for other, each in IMPLEMENTATIONS.items() if each.automatic}
    kernels = {other: each.cannot(call) for other, each in automatic.items() if each.platform == call.platform}
    why = [f"{other} serves {reason}" for other, reason in kernels.items() if reason and name == "blockwise"]
    return f"{name} ({'; '.join([IMPLEMENTATIONS[name].note, *why])})"


def platform() -> str:
    """Where the active mesh computes, or the default device: cpu, gpu or tpu. It may be a machine that is not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
