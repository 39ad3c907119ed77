"""Defines the neuron mask of a gated MLP, and the register of scores by which neurons are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from resting.sparsifier.errors import PlanError, SparsifierError

Option = float | int | str


@dataclass(frozen=True, eq=False)
class Seen:
    """Holds what a score may look at, in one forward of one MLP.

    Attributes
    ----------
    z : Tensor [..., neurons]
        The input of down.
    u : Tensor [..., neurons], optional
        The output of up, where `Score.sees` has ``"u"``.
    x : Tensor [..., hidden], optional
        The input of gate and up, where `Score.sees` has ``"x"``.
    prompt : Tensor [batch, 1, neurons], optional
        The statistic of the prompt (`neurons.sequence`), where `Score.asks_for_prompt`.
    scale : Tensor [neurons], optional
        That of the mask, on the device of z.
    tensors : mapping of str to Tensor
        Those of the mask and what `Score.prepare` made, on the device of z.
    act : callable, optional
        The activation of the gate.
    """

    z: Tensor
    u: Tensor | None = None
    x: Tensor | None = None
    prompt: Tensor | None = None
    scale: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    act: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Score:
    """Says how a registered score is computed, and what it costs.

    Attributes
    ----------
    compute : callable
        From a `NeuronMask` and what was `Seen` to the score of every token and neuron, [..., neurons] or what
        broadcasts to it; with `chooses`, to whether the neuron is kept.
    sees : frozenset of {"u", "x"}
        What it looks at beside the input of down.
    reads_whole : tuple of str
        Roles of gate and up whose rows must all be read to know the score.
    chooses : bool
        Whether it says itself which neurons are kept: such a mask has neither `threshold` nor `kept`.
    asks_for_prompt : bool
        Whether it looks at the statistic of the prompt.
    by_token : bool
        Whether the mask changes from token to token, and not only from sequence to sequence.
    takes_scale : bool
        Whether `NeuronMask.scale` has a meaning.
    shapes : callable
        From mask, width of the hidden state and number of neurons to the shapes of the tensors it needs, by name.
    extra : callable
        From the same to the numbers that a token reads beside the weights, in units of the model's elements.
    prepare : callable, optional
        From mask, weight of gate, weight of up and their biases to further tensors, once for each use of a plan.
    check : callable, optional
        Raises `PlanError` where options of a mask are none.
    """

    compute: Callable[[NeuronMask, Seen], Tensor]
    sees: frozenset[str] = frozenset()
    reads_whole: tuple[str, ...] = ()
    chooses: bool = False
    asks_for_prompt: bool = False
    by_token: bool = True
    takes_scale: bool = True
    shapes: Callable[[NeuronMask, int, int], dict[str, list[int]]] = lambda mask, hidden, neurons: {}
    extra: Callable[[NeuronMask, int, int], float] = lambda mask, hidden, neurons: 0.0
    prepare: Callable[..., dict[str, Tensor]] | None = None
    check: Callable[[NeuronMask], None] | None = None


SCORES: dict[str, Score] = {}
"""Registered scores by name: a plan's file holds the name."""


def register_score(name: str, score: Score) -> Score:
    """Registers a score under `name`; a plug-in does it when its module is imported.

    Raises
    ------
    SparsifierError
        If the name is taken by another score, or is no word.
    """
    if not name or "/" in name or name != name.strip():
        raise SparsifierError(f"a score has a name without '/' and blanks around it, got {name!r}")
    if SCORES.setdefault(name, score) is not score:
        raise SparsifierError(f"a score named {name!r} is registered already: choose another name")
    return score


@dataclass(frozen=True, eq=False)
class NeuronMask:
    r"""Says which neurons of a gated MLP rest: rows of gate and up together with columns of down.

    .. math:: z_j = a(W_{gate} x)_j \, (W_{up} x)_j, \qquad y = W_{down} (z \odot keep)

    A resting neuron gives z_j = 0, so that the mask acts on the input of down. A neuron is kept where its score
    exceeds `threshold`, or where it has one of the `kept` largest scores of its token.

    Attributes
    ----------
    score : str
        A registered name (`SCORES`).
    threshold : float, optional
        At least 0.
    kept : int, optional
        Neurons kept of every token, instead of those above a threshold.
    scale : Tensor [neurons], optional
        Finite, at least 0: weighs the neurons in the score.
    tensors : mapping of str to Tensor
        What the score needs, by the names that it gives them.
    options : mapping of str to number or str
        What else decides on the score.
    """

    score: str
    threshold: float | None = None
    kept: int | None = None
    scale: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.known
        given = [name for name in ("threshold", "kept") if getattr(self, name) is not None]
        if len(given) != (0 if known.chooses else 1):
            wanted = "neither threshold nor kept" if known.chooses else "one of threshold and kept"
            raise PlanError(f"a neuron mask by {self.score!r} takes {wanted}, got {', '.join(given) or 'none'}")
        if self.threshold is not None and (not isinstance(self.threshold, Real) or not self.threshold >= 0):
            raise PlanError(f"the threshold of a neuron mask must be a number of at least 0, got {self.threshold}")
        if self.kept is not None and (not isinstance(self.kept, Integral) or self.kept < 0):
            raise PlanError(f"kept must be a whole number of at least 0, got {self.kept}")
        if self.scale is not None:
            if not known.takes_scale:
                raise PlanError(f"a neuron mask by {self.score!r} takes no scale")
            if self.scale.dim() != 1 or not bool(torch.isfinite(self.scale).all()) or bool((self.scale < 0).any()):
                raise PlanError("the scale of a neuron mask must be a vector of finite numbers of at least 0")
        for name, value in self.tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise PlanError(f"{name} of a neuron mask must be finite, got NaN or infinity")
        if known.check is not None:
            known.check(self)

    @property
    def known(self) -> Score:
        """Gives what is registered under the name of the score.

        Raises
        ------
        PlanError
            If nothing is: a plug-in's module may have to be imported first.
        """
        if self.score not in SCORES:
            raise PlanError(
                f"a neuron mask by {self.score!r}, which is no registered score; allowed: {', '.join(SCORES)}"
            )
        return SCORES[self.score]

    def check_shapes(self, where: str, hidden: int, neurons: int) -> None:
        """Refuses what does not fit an MLP of this width at `where`.

        Raises
        ------
        PlanError
        """
        if self.kept is not None and self.kept > neurons:
            raise PlanError(f"kept at {where} is {self.kept}, and the MLP has {neurons} neurons")
        wanted = self.known.shapes(self, hidden, neurons)
        if self.scale is not None and len(self.scale) != neurons:
            raise PlanError(f"scale at {where} has {len(self.scale)} entries, the MLP has {neurons} neurons")
        for name in sorted(wanted.keys() ^ self.tensors.keys()):
            fault = "lacks" if name in wanted else "has no use for"
            raise PlanError(f"the neuron mask by {self.score!r} at {where} {fault} the tensor {name!r}")
        for name, shape in wanted.items():
            if list(self.tensors[name].shape) != shape:
                raise PlanError(f"{name} at {where} is {list(self.tensors[name].shape)}, the model needs {shape}")
        extra, whole = self.extra_elements(hidden, neurons), 3 * hidden * neurons
        if extra >= whole:
            raise PlanError(
                f"the score {self.score!r} at {where} reads {extra:.0f} numbers for every token, and the whole MLP has "
                f"{whole}: its predictor is wider than its site"
            )

    def extra_elements(self, hidden: int, neurons: int) -> float:
        """Counts the numbers that a decode step reads to know the mask, in units of the model's elements."""
        return self.known.extra(self, hidden, neurons)

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Gives what a file holds of it: values for JSON, and tensors."""
        values: dict[str, Any] = {"score": self.score}
        values |= {n: getattr(self, n) for n in ("threshold", "kept") if getattr(self, n) is not None}
        values |= {"options": dict(self.options)} if self.options else {}
        tensors = dict(self.tensors) | ({} if self.scale is None else {"scale": self.scale})
        return values, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def of_saved(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NeuronMask:
        """Makes a mask of what `saved` gave.

        Raises
        ------
        PlanError
            If it has what no mask has.
        """
        allowed = {"score", "threshold", "kept", "options"}
        if not isinstance(values, Mapping) or not {"score"} <= values.keys() <= allowed:
            raise PlanError(f"a neuron mask has a score and some of {', '.join(sorted(allowed))}, got {values!r}")
        others = {name: tensor for name, tensor in tensors.items() if name != "scale"}
        return cls(**values, scale=tensors.get("scale"), tensors=others)


def is_kept(mask: NeuronMask, seen: Seen) -> Tensor:
    """Tells which neurons a mask keeps: bool [..., neurons], or what broadcasts to it.

    Exactly `kept` neurons are, whatever ties there are; NaN is kept, as it would pass a dense layer.
    """
    score = mask.known.compute(mask, seen)
    if mask.known.chooses:
        return score.bool()
    if mask.kept is None:
        assert mask.threshold is not None
        return ~(score <= _below(mask.threshold, score.dtype))
    chosen = score.topk(min(mask.kept, score.shape[-1]), -1, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def _below(threshold: float, dtype: torch.dtype) -> float:
    """Rounds down to `dtype`: comparing in it is then comparing in full precision."""
    if math.isinf(threshold):
        return threshold
    rounded = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return float(rounded)
