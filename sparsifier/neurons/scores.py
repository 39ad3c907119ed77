"""Registers the scores of the suite's neuron masks."""

from __future__ import annotations

from torch import Tensor

from resting.sparsifier.errors import PlanError
from resting.sparsifier.neurons.mask import NeuronMask, Score, Seen, register_score
from resting.sparsifier.neurons.proxy import checked_proxy, proxy_elements, proxy_score, rounded_copies


def _scaled(value: Tensor, seen: Seen) -> Tensor:
    """Weighs magnitudes by the scale, in fp32 at least: products of two numbers of 16 bits are compared."""
    return value.abs() if seen.scale is None else value.abs() * seen.scale


def _up(mask: NeuronMask, seen: Seen) -> Tensor:
    assert seen.u is not None
    return _scaled(seen.u, seen)


def _product(mask: NeuronMask, seen: Seen) -> Tensor:
    return _scaled(seen.z, seen)


def _fixed(mask: NeuronMask, seen: Seen) -> Tensor:
    return seen.tensors["keep"]


def _prompt(mask: NeuronMask, seen: Seen) -> Tensor:
    """Gives GRIFFIN's statistic, or its ranks mixed with those of a prior (GLASS)."""
    assert seen.prompt is not None
    if "prior" not in mask.tensors:
        return seen.prompt
    share = float(mask.options["lambda"])
    return share * _ranks(seen.prompt) + (1.0 - share) * _ranks(seen.tensors["prior"])


def _ranks(values: Tensor) -> Tensor:
    """Gives every entry its rank in the last dimension, from 0 for the smallest; equal ones in their order."""
    return values.argsort(dim=-1, stable=True).argsort(-1).double()


def _check_prompt(mask: NeuronMask) -> None:
    share = mask.options.get("lambda")
    if ("prior" in mask.tensors) != (share is not None):
        raise PlanError("a mask from the prompt has a prior and the option lambda together, or neither")
    if share is not None and (isinstance(share, str) or not 0.0 <= share <= 1.0):
        raise PlanError(f"lambda, the share of the prompt's ranks, must be in [0, 1], got {share!r}")


def _row(seen: Seen, best: Tensor) -> Tensor:
    return seen.tensors["codebook"][best]


def _cluster_of_oracle(mask: NeuronMask, seen: Seen) -> Tensor:
    """Gives the set that keeps most of ``(scale z)^2``: it needs the neurons that it lets rest."""
    weights = _scaled(seen.z.float(), seen).square()
    return _row(seen, (weights @ seen.tensors["codebook"].to(weights).T).argmax(-1))


def _cluster_of_head(mask: NeuronMask, seen: Seen) -> Tensor:
    """Gives the set for which a linear head on x expects most."""
    assert seen.x is not None
    head, bias = (seen.tensors[name].float() for name in ("head", "head_bias"))
    return _row(seen, (seen.x.float() @ head.T + bias).argmax(-1))


def _cluster_of_prompt(mask: NeuronMask, seen: Seen) -> Tensor:
    """Gives the set that keeps most of the prompt's statistic."""
    assert seen.prompt is not None
    weights = seen.prompt.square()
    return _row(seen, (weights @ seen.tensors["codebook"].to(weights).T).argmax(-1))


def _check_codebook(mask: NeuronMask) -> None:
    book = mask.tensors.get("codebook")
    if book is None or book.dim() != 2 or not len(book) or bool(((book != 0) & (book != 1)).any()):
        raise PlanError("a codebook is [sets, neurons] of 0 and 1, with at least one set")


def _codebook(mask: NeuronMask, hidden: int, neurons: int) -> dict[str, list[int]]:
    return {"codebook": [len(mask.tensors["codebook"]), neurons]}


def _with_head(mask: NeuronMask, hidden: int, neurons: int) -> dict[str, list[int]]:
    sets = len(mask.tensors["codebook"])
    return _codebook(mask, hidden, neurons) | {"head": [sets, hidden], "head_bias": [sets]}


def _head_elements(mask: NeuronMask, hidden: int, neurons: int) -> float:
    """Counts the head, its bias, and one row of the codebook at a bit for each neuron."""
    return len(mask.tensors["codebook"]) * (hidden + 1) + neurons / 16


def _shapes_of_prompt(mask: NeuronMask, hidden: int, neurons: int) -> dict[str, list[int]]:
    return {"prior": [neurons]} if "prior" in mask.tensors else {}


register_score("up", Score(_up, sees=frozenset({"u"}), reads_whole=("up",)))
register_score("product", Score(_product))
register_score(
    "fixed",
    Score(
        _fixed,
        chooses=True,
        by_token=False,
        takes_scale=False,
        shapes=lambda mask, hidden, neurons: {"keep": [neurons]},
    ),
)
register_score(
    "prompt", Score(_prompt, asks_for_prompt=True, by_token=False, shapes=_shapes_of_prompt, check=_check_prompt)
)
register_score("clusters", Score(_cluster_of_oracle, chooses=True, shapes=_codebook, check=_check_codebook))
register_score(
    "clusters-head",
    Score(
        _cluster_of_head,
        sees=frozenset({"x"}),
        chooses=True,
        takes_scale=False,
        shapes=_with_head,
        extra=_head_elements,
        check=_check_codebook,
    ),
)
register_score(
    "clusters-prompt",
    Score(
        _cluster_of_prompt, chooses=True, asks_for_prompt=True, by_token=False, shapes=_codebook, check=_check_codebook
    ),
)
register_score(
    "proxy",
    Score(
        proxy_score,
        sees=frozenset({"x"}),
        extra=proxy_elements,
        prepare=rounded_copies,
        check=checked_proxy,
    ),
)
