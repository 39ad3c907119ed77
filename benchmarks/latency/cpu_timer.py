"""Plans of a model on a CPU against its fastest dense paths: step by step, and as `generate` runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from resting.benchmarks.latency import generating, timing
from resting.benchmarks.latency.decode import (
    DENSE_PATHS,
    Decode,
    dense_path,
    fastest_dense,
    neutral,
    what_is_read,
)
from resting.benchmarks.latency.timed_model import TimedModel
from resting.sparsifier import Plan, SparsifierError, TokenPolicy
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step.by_step import step_of


class CpuTimer:
    """Times plans of a model on a CPU against its fastest dense path.

    Parameters
    ----------
    model : TimedModel
    prompt : int
        Tokens before those that are timed.
    threads : int
        Of the kernels.
    paths : sequence of str
        Dense paths that are tried.
    generates : bool
        Whether `generate` is timed as well.

    Attributes
    ----------
    path, generate_path : str
        The fastest dense paths, of a step and of `generate`; the latter is empty where that is not timed.
    tried, generate_tried : dict of str to float or str
        Seconds per token of every dense path, or why it did not run.
    """

    def __init__(
        self,
        model: TimedModel,
        prompt: int,
        threads: int,
        paths: Sequence[str] = DENSE_PATHS,
        generates: bool = True,
    ) -> None:
        self._model, self._prompt, self._threads, self._generates = model, prompt, threads, generates
        self.path, self.tried = fastest_dense(model.dense, model.ids, prompt, threads, paths)
        ids = model.ids[:, :prompt]
        self.generate_path, self.generate_tried = "", dict[str, float | str]()
        if generates:
            self.generate_path, self.generate_tried = generating.fastest_dense(model.dense, ids, paths, threads)

    def times(self, plan: Plan, base: Plan | None, policy: TokenPolicy) -> dict[str, Any]:
        """Decode the same text with the dense model and under plans, in turn; then let both generate: see `Timer`.

        Of a quantised model the codes with nothing at rest are timed in turn with them.
        """
        model, ids, prompt = self._model, self._model.ids, self._prompt
        sparse_models = {"sparse": (plan, model.sparse)}
        if base is not None:
            sparse_models["base"] = (base, model.third_copy)
        own = None if model.format is None else model.fourth_copy
        model.declare()
        if own is not None:
            sparse_models["own_dense"] = (neutral(own), own)
        read = what_is_read(model.sparse, plan, ids, prompt, model.format)
        with ExitStack() as stack:
            begins: dict[str, Callable[[], Decode]] = {}
            forms: dict[str, str] = {}
            for name, (under, copy) in sparse_models.items():
                stack.enter_context(decoding(under, copy, policy, self._threads))
                if model.format is not None:
                    forms["forms"] = blocks_of(copy)
                begins[name] = partial(Decode, copy, ids, prompt)
            stack.enter_context(torch.inference_mode())
            with dense_path(model.dense, self.path, self._threads) as begin:
                begins = {"dense": lambda: begin(ids, prompt)} | begins
                prefill = {name: [start().prefill for _ in range(3)] for name, start in begins.items()}
                running = {name: start() for name, start in begins.items()}
                steps = {name: decode.step for name, decode in running.items()}
                times = timing.interleaved(steps, ids.shape[1] - prompt - 1)
            generated: timing.Times = {}
            if self._generates:
                with generating.dense_way(model.dense, self.generate_path, self._threads) as options:
                    generated = generating.compared(model.dense, model.sparse, ids, prompt, options)
        prefills = {f"prefill_{name}": values for name, values in prefill.items()}
        more = {"own_dense": timing.p20(times["own_dense"])} if own is not None else {}
        return times | more | prefills | generated | read | forms


def blocks_of(model: Any) -> str:
    """Say how many blocks of a quantised model read which codes: without them its time were not that of its format.

    Raises
    ------
    SparsifierError
        If it decodes without its codes.
    """
    step = step_of(model)
    if step is None:
        raise SparsifierError(
            "codes are read by the step of a whole model alone, which does not take this plan or model"
        )
    if step.reason:
        raise SparsifierError(step.reason)
    return "; ".join(f"{count} {form}" for form, count in step.kernels.items())
