"""Fits a method to a model, measures the plan on held-out text, and says in the plan how it was made."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resting.benchmarks import provenance
from resting.benchmarks.assets import models
from resting.benchmarks.cells.suite import Bos
from resting.benchmarks.fitting import documents, held_out, material, resuming
from resting.benchmarks.fitting.documents import Given
from resting.benchmarks.fitting.material import Material, Sizes
from resting.benchmarks.fitting.methods import check_window, method_of
from resting.benchmarks.progress import Console
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    OnProgress,
    Plan,
    Sparsifier,
    TokenPolicy,
    check_logits,
    silent,
)

PACKAGES = ("resting-neurons", "torch", "transformers", "tokenizers")
TRIES = 5
"""At most so many plans are measured until the bytes match."""
TOLERANCE = 0.01
"""Distance of the measured bytes from the target from which on a plan comes with a warning."""


@dataclass
class Fit:
    """Holds one fit: a method, a dense model, and text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It is left as it was.
    method : Sparsifier
    material : Material
    on_progress : OnProgress, optional
    checkpoint : Path, optional
        Folder from which an interrupted fit goes on.
    facts : mapping, optional
        What else the plan says of where it is from.
    warn : callable
        Is told, in a sentence, what the plan should be read with.
    """

    model: Any
    method: Sparsifier
    material: Material
    on_progress: OnProgress = silent
    checkpoint: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    warn: Callable[[str], Any] = warnings.warn

    def run(self) -> Plan:
        """Fit and measure; what the checkpoint holds stays until `end`.

        Raises
        ------
        SparsifierError
            If the model is not supported, the target cannot be reached, or something is NaN or infinite.
        FitError
            If the checkpoint cannot be used.
        """
        began, calibration = time.monotonic(), self.material.calibration
        check_logits(self.model)
        calibrated = _Told(self.model, calibration, self.on_progress)
        with resuming.kept(self.checkpoint, calibrated, self.method):
            plan = self.method.plan_for(calibrated)
        seconds = round(time.monotonic() - began, 1)
        if abs(plan.info.get("matched", plan.target) - plan.target) > TOLERANCE:
            self.warn(
                f"{plan.method} leaves {plan.info['matched']:.4f} of the bytes unread on the text it is fitted on: no "
                f"threshold meets the target of {plan.target:g}"
            )
        found = held_out.measured(self.model, plan, self.material, calibration.tokens, self.on_progress)
        return replace(plan, info=plan.info | {"fitted": self._fitted(plan, seconds), "measured": found})

    def end(self) -> None:
        """Remove the checkpoint of a fit whose plan is safe."""
        if self.checkpoint is not None:
            calibrated = CalibratedModel(self.model, self.material.calibration)
            resuming.remove(self.checkpoint, resuming.key_of(calibrated, self.method))

    def _fitted(self, plan: Plan, seconds: float) -> dict[str, Any]:
        windows, parameter = self.material.calibration.windows, next(self.model.parameters())
        about = {
            "method": plan.method,
            "target": plan.target,
            "parameters": json.loads(json.dumps(self.method.spec(), default=str)),  # as files will have it
            "text": self.material.text,
            "tokens": windows.numel(),
            "windows": len(windows),
            "window": windows.shape[1],
            "token_policy": str(self.material.calibration.tokens),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "model": _name_of(self.model),
            "fingerprint": plan.model,
            "versions": {name: provenance.version(name) for name in PACKAGES},
            "seconds": seconds,
        }
        return about | dict(self.facts)


def fit(
    model: Any,
    method: str | Sparsifier,
    *,
    tokenizer: Any,
    target: float | None = None,
    text: Given = "wikipedia",
    held_out: Given | None = None,
    tokens: TokenPolicy = AllButFirst(1),
    windows: int | None = None,
    window: int = 512,
    steps: int | None = None,
    seed: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    inner: Mapping[str, Any] | None = None,
    statistics_windows: int = 16,
    matching_windows: int = 16,
    held_out_windows: int = 16,
    bos: Bos = "auto",
    progress: bool | OnProgress = True,
    checkpoint: Path | str | None = None,
) -> Plan:
    """Fit a method to a dense model so that the *measured* bytes meet the target, and measure what that costs.

    What is measured is never fitted on. A known text has documents of its own for either use. Of a file or a list of
    documents the last tenth, and at least one window, is held out: whole documents of a list, the last tokens of a
    file. `held_out` names another text instead, and then all of `text` is fitted on.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense, in any floating dtype and on any device; it is left as it was.
    method : str or Sparsifier
        ``"teal"``, ``"spon-refined(teal)"`` and so on, as suites name methods, or one that is made already.
    tokenizer : transformers.PreTrainedTokenizer
        Of the model.
    target : float, optional
        Share of the weight bytes of all blocks that a decode step leaves unread, between 0 and 1; 0.5 by default, and
        for a sparsifier that is made already its own.
    text : str, Path or list of str
        Name of a known text (``"wikipedia"``, ``"papers"``, ``"stories"``; more from the hub), path of a UTF-8 file,
        ``organisation/name`` or ``organisation/name:column`` of a data set on the hub, or documents.
    held_out : str, Path or list of str, optional
        Text to measure on.
    tokens : TokenPolicy
        Which tokens are sparse.
    windows : int, optional
        Windows to fit on, fewer than the text has; all of them by default.
    window : int
        Tokens of a window: at least those that the method trains on (128, unless its parameters say otherwise).
    steps, seed : int, optional
        Of methods that train, or draw random numbers.
    parameters, inner : mapping, optional
        Further parameters of the method, and of the one that it wraps, as in suites.
    statistics_windows, matching_windows, held_out_windows : int
        How many windows give statistics, are run sparse to meet the target, and are measured on at most.
    bos : {"auto", "always", "never"}
        What every window begins with.
    progress : bool or OnProgress
        Show every step with the time left on standard error, or tell a function of it.
    checkpoint : Path or str, optional
        Folder in which training is kept, so that an interrupted call with the same arguments goes on. It is
        removed when the fit is through.

    Returns
    -------
    Plan
        ``plan.info["fitted"]`` says what it was made of, and ``plan.info["measured"]`` what it does on held-out text
        (`held_out.measured`).

    Raises
    ------
    BenchmarkError
        If an argument will not do, or there is too little text: before anything is computed.
    SparsifierError
        If the model is not supported, the target cannot be reached, or something is NaN or infinite.
    """
    built = method_of(method, target, steps, seed, parameters, inner)
    check_window(built, window)
    sizes = Sizes(windows, window, statistics_windows, matching_windows, held_out_windows)
    found = material.of(documents.read(text, held_out), tokenizer, sizes, tokens, bos)
    material.check(found, model, tokenizer)
    if lacking := material.lacks_bos(model, tokenizer, bos):
        warnings.warn(lacking, stacklevel=2)
    console = Console(quiet=progress is not True)
    told = progress if callable(progress) else console.stage
    one = Fit(model, built, found, told, None if checkpoint is None else Path(checkpoint))
    try:
        plan = one.run()
    finally:
        console.end()
    one.end()
    return plan


class _Told(CalibratedModel):
    """Tells of every try to meet the target, which otherwise takes a while without a word."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._tried: Counter[str] = Counter()

    def measure(self, plan: Plan) -> float:
        self._tried[plan.method] += 1
        stage, done = f"match {plan.method}", min(self._tried[plan.method], TRIES)
        self.on_progress(stage, done - 1, TRIES, "at most")
        found = super().measure(plan)
        self.on_progress(stage, done, TRIES, f"at most, measured {found:.4f}")
        return found


def _name_of(model: Any) -> str:
    """The model's name without the folder that it lies in; that of the default model finds it again."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    if not Path(name).exists():
        return name
    folder = Path(name).resolve()
    return models.DEFAULT if models.is_default(folder) else folder.name
