"""Implements GRIFFIN (Dong and others, 2024, arXiv 2404.01365, COLM 2024), and GLASS's mix of ranks with a prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    Site,
    SparsifierError,
    neuron_statistics,
)


@dataclass
class Griffin(NeuronSparsifier):
    r"""Keeps, for all tokens after a prompt, the neurons that the prompt used most.

    .. math:: s_j = \Big\| \big( z_{tj} / \|z_t\|_2 \big)_{t = 1..P} \Big\|_2, \qquad
        keep = \text{the } k \text{ largest } s_j

    The prompt runs dense, and the mask stays for the rest of the sequence: rows of gate and up and columns of down
    rest. No calibration, no threshold, and no byte beside the weights. It needs a token policy with a prompt.

    With a `prior` ranks are mixed (GLASS, 2508.14302): ``rank_j = prior rank_j(prompt) + (1 - prior) rank_j(text)``,
    with the same statistic over the calibration text. At 0 that is a static mask, at 1 GRIFFIN.

    Source: released code, hdong920/GRIFFIN d1d3d6e (no licence in the tree: written from the formula); GLASS second
    hand, and its weight of a half a guess of ours.

    Parameters
    ----------
    prior : float, optional
        GLASS's lambda, in [0, 1]: the weight of the prompt's ranks.
    """

    name: ClassVar[str] = "griffin"
    paper: ClassVar[str] = "Dong and others 2024, arXiv 2404.01365; baselines/griffin.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"griffin-prior": {"prior": 0.5}}

    prior: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior is not None and not 0.0 <= self.prior <= 1.0:
            raise SparsifierError(f"prior must be in [0, 1], got {self.prior}")

    @property
    def score(self) -> str:
        return "prompt"

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        decoder = calibrated.decoder
        kept = {site: self.kept(decoder.mlp_shape(site)[1], share) for site in decoder.neuron_sites()}
        if self.prior is None:
            return {site: NeuronMask("prompt", kept=count) for site, count in kept.items()}
        known = neuron_statistics(calibrated)
        return {
            site: NeuronMask(
                "prompt",
                kept=count,
                tensors={"prior": known[site].shares.sqrt().float()},
                options={"lambda": float(self.prior)},
            )
            for site, count in kept.items()
        }
