"""Plans of a model on a GPU against its fastest dense paths: by the step that `decoding` uses, and by `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import generating, timing
from resting.benchmarks.latency.decode import DENSE_TRIAL, Decode, neutral, what_is_read
from resting.benchmarks.latency.gpu.compiling import DENSE_PATHS, OVERLAPPING, overlaps
from resting.benchmarks.latency.gpu.dense_step import DenseStep, GraphDecode
from resting.benchmarks.latency.timed_model import TimedModel
from resting.sparsifier import Plan, SparsifierError, TokenPolicy
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step.by_step import step_of
from resting.sparsifier.decoding.step.reading import read

VARIANTS = 64
"""Kinds of modules (blocks of several models, what is around them) that torch.compile may keep code for."""
GENERATE_PATHS = ("eager", "compiled")
"""Of a dense model, as they are tried."""


class SparseDecode:
    """Decodes a forced text by the step of a model that is under a plan; the prompt goes through the definition."""

    def __init__(self, model: Any, ids: Tensor, prompt: int) -> None:
        decode = Decode(model, ids, prompt)
        decode.step()  # the step takes the cache
        self._held = decode  # or the step gives the cache back
        self._step, self._ids, self._at = step_of(model), ids, decode.at
        if self._step is None:
            raise SparsifierError("the plan has a rule that a step does not compute: it decodes by single layers")
        self._step.store.ensure(ids.shape[1])

    @property
    def forms(self) -> str:
        """Say how many blocks run in which form: ``32 compiled``, or in Triton with the reason."""
        return "; ".join(f"{count} {form}" for form, count in getattr(self._step, "kernels", {}).items())

    def step(self, _: int = 0) -> Tensor:
        """Compute the logits of the next token, in the same memory every time."""
        logits: Tensor = self._step.compute(self._ids[:, self._at : self._at + 1], self._at)
        self._at += 1
        return logits


class GpuTimer:
    """Times plans of a model against the fastest of its captured dense steps, and against its own `generate`.

    Parameters
    ----------
    model : TimedModel
    prompt : int
        Tokens before those that are timed.
    paths : sequence of str
        Dense paths that are tried, by their names in `compiling.DENSE_PATHS`; all where it is empty.
    generates : bool
        Whether `generate` is timed as well.

    Attributes
    ----------
    path, generate_path : str
        The fastest dense paths, of a step and of `generate`; the latter is empty where that is not timed.
    tried, generate_tried : dict of str to float or str
        Seconds per token of every dense path, or why it did not run; of a step also that of the kernels with nothing
        at rest, which is no path to compare with.

    Raises
    ------
    SuiteError
        If the blocks of the model have no known form.
    """

    def __init__(self, model: TimedModel, prompt: int, paths: Sequence[str] = (), generates: bool = True) -> None:
        self._model, self._prompt, self._paths, self._generates = model, prompt, paths, generates
        decoder = Decoder.of(model.dense)
        try:
            form = read(model.dense, decoder)
        except SparsifierError as error:
            raise SuiteError(f"{model.name} is not timed on a GPU: {error}") from error
        text = model.ids[:, :prompt]
        self.generate_path, self.generate_tried = "", dict[str, float | str]()
        if generates:
            self.generate_path, self.generate_tried = generating.fastest_dense(model.dense, text, GENERATE_PATHS, 1)
        step = partial(DenseStep, model.dense, form, decoder, -(-model.ids.shape[1] // 16) * 16)
        self.path, self._dense, self.tried = self._fastest_dense(step)
        model.declare()
        self.tried["kernels"] = self._kernels()

    @torch.inference_mode()
    def _fastest_dense(self, make: Any) -> tuple[str, GraphDecode, dict[str, float | str]]:
        found: dict[str, float | str] = {}
        decodes: dict[str, GraphDecode] = {}
        ids, prompt = self._model.ids, self._prompt
        steps = min(DENSE_TRIAL, ids.shape[1] - prompt - 1)
        for name, options in DENSE_PATHS.items():
            if self._paths and name not in self._paths:
                continue
            if OVERLAPPING in (options or ()) and not overlaps(ids.device):
                if self._paths:
                    found[name] = "launches begin early from compute capability 9.0 on, and where torch knows of it"
                continue
            try:
                with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                    decode = GraphDecode(make(), ids, prompt, options)
                decode.begin()
                times = timing.interleaved({name: decode.step}, steps - 1, timing.device_clock())
                found[name] = timing.p20(times[name])
                decodes[name] = decode
            except Exception as error:  # a compiler that is missing
                found[name] = " ".join(str(error).split())[:300]
        if not decodes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
            raise SuiteError(f"{self._model.name} is not timed on a GPU: no dense path runs ({reasons})")
        best = min(decodes, key=lambda name: float(found[name]))
        return best, decodes[best], found

    def _kernels(self) -> float | str:
        """Time the step of a plan under which nothing rests."""
        model, ids = self._model.sparse, self._model.ids
        try:
            with decoding(neutral(model), model), torch.inference_mode():
                decode = SparseDecode(model, ids, self._prompt)
                steps = min(DENSE_TRIAL, ids.shape[1] - self._prompt - 2)
                times = timing.interleaved({"kernels": decode.step}, steps - 1, timing.device_clock())
            return timing.p20(times["kernels"])
        except SparsifierError as error:
            return str(error)

    def times(self, plan: Plan, base: Plan | None, policy: TokenPolicy) -> dict[str, Any]:
        """Decode under `plan`, and under `base`, in turn with the dense step; then let the models generate.

        Prompts are not timed.
        """
        model, ids, prompt = self._model, self._model.ids, self._prompt
        models = {"sparse": (plan, model.sparse)}
        if base is not None:
            models["base"] = (base, model.third_copy)
        model.declare()
        read = what_is_read(model.sparse, plan, ids, prompt, model.format)
        with ExitStack() as stack:
            for under, copy in models.values():
                stack.enter_context(decoding(under, copy, policy))
            stack.enter_context(torch.inference_mode())
            decodes = {name: SparseDecode(copy, ids, prompt) for name, (_, copy) in models.items()}
            forms = decodes["sparse"].forms
            steps: dict[str, Callable[[int], object]] = {name: decode.step for name, decode in decodes.items()}
            self._dense.begin()
            steps = {"dense": self._dense.step} | steps
            times = timing.interleaved(steps, ids.shape[1] - prompt - 2, timing.device_clock())
            generated: timing.Times = {}
            if self._generates:
                options = generating.OPTIONS[self.generate_path]
                generated = generating.compared(model.dense, model.sparse, ids, prompt, options)
        unknown = {"prefill_dense": [float("nan")], "prefill_sparse": [float("nan")]}
        own = self.tried["kernels"]
        more = {"own_dense": own} if isinstance(own, float) else {}
        return times | unknown | generated | more | read | {"forms": forms}
