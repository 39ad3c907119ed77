"""Keeps the neuron masks of a step on a CPU, as numbers that its operations read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.step.cpu_program import FLOAT, CpuProgram
from resting.sparsifier.decoding.step.cpu_weights import CpuWeights
from resting.sparsifier.decoding.step.following import is_known
from resting.sparsifier.decoding.step.reading import roles_of
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.roles import NEURONS
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site

ROWS = ("gate", "up", "gate_up")
"""Roles whose rows rest."""


class CpuNeurons:
    r"""Computes gated MLPs of which neurons rest: the rows of gate and up of those that are kept, and columns of down.

    .. math:: z = a(W_{gate,K} \, x) \odot W_{up,K} \, x

    A mask that stays for a sequence is written into memory when the sequence begins to decode. Others are computed for
    every token: by the output of up, which is read whole then, or by a head that chooses a set of a codebook.

    Parameters
    ----------
    masks : dict of Site to NeuronMask
    decoder : Decoder
    dtype : torch.dtype
        Of the model.

    Attributes
    ----------
    kept : dict of Site to Tensor [neurons]
        1 for a neuron that is kept and 0 for one that rests, in fp32, by site; a step reads them anew for each token.
    by_rows : frozenset of Site
        Matrices whose rows rest.

    Raises
    ------
    SparsifierError
        If a mask changes from token to token otherwise.
    """

    def __init__(self, masks: Mapping[Site, NeuronMask], decoder: Decoder, dtype: torch.dtype) -> None:
        self._masks, self._decoder, self._dtype = masks, decoder, dtype
        self.kept: dict[Site, Tensor] = {}
        by_rows = set()
        for site, mask in masks.items():
            if not is_known(mask):
                raise SparsifierError(f"there is no operation of a step for neuron masks by {mask.score!r}")
            with torch.inference_mode(False):
                self.kept[site] = torch.zeros(decoder.mlp_shape(site)[1])
            rests = ROWS if mask.score != "up" else ("gate", "gate_up")
            by_rows |= {site._replace(role=role) for role in rests if role in roles_of(decoder, site.block)}
        self.by_rows = frozenset(by_rows)

    def masks(self, block: int) -> bool:
        """Tells whether neurons of a block's MLP rest."""
        return Site(block, NEURONS) in self._masks

    def write(
        self, program: CpuProgram, weights: CpuWeights, block: int, activation: int, x: int, at: Mapping[str, int]
    ) -> int:
        """Writes what comes before down: from the address of the MLP's input to that of the input of down."""
        site, roles = Site(block, NEURONS), roles_of(self._decoder, block)
        mask, kept, gate = self._masks[site], program.hold(self.kept[site]), at["gate"]
        n, is_fused = len(self.kept[site]), "gate_up" in roles
        last = weights.matrix(site._replace(role="gate_up" if is_fused else "up"))
        first = last if is_fused else weights.matrix(site._replace(role="gate"))
        half = slice(n, 2 * n) if is_fused else slice(0, n)
        for matrix in (first,) if mask.score == "up" else (first, last):
            if matrix.rule.low_rank is not None:
                raise SparsifierError("a low-rank part at a matrix whose rows rest has no decode kernel")
        up = gate + n * FLOAT
        if mask.score == "up":
            if is_fused:
                program.rows(last, half, x, up)
            else:
                program.product(last, x, up)
            rule = Rule(threshold=mask.threshold or 0.0, scale=1.0 if mask.scale is None else mask.scale)
            program.mark(up, kept, rule.cutoff(self._dtype), n)
        else:
            if mask.score == "clusters-head":
                program.choose(x, kept, *(mask.tensors[name] for name in ("head", "head_bias", "codebook")))
            up = at["opened"]
            program.gated(last, half, 0.5, x, kept, up)
        program.gated(first, slice(0, n), 0.5, x, kept, gate)
        program.open(activation, gate, n)
        program.multiply(gate, up, n)
        return up
