"""Rounds weights one input after the other, and lets later inputs make up for the error (GPTQ, arXiv 2210.17323).

Inputs are gone through one by one, and the groups of this project's formats run along the outputs of one input: so the
scale of a group is taken from weights that have been moved already, and any order of inputs gives the same layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resting.sparsifier.block_stream import BlockStream, stages
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.errors import DivergedError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import check, keep
from resting.sparsifier.quantised.nearest import nearest, scales_and_zeros
from resting.sparsifier.quantised.weight import QuantisedWeight, groups_of
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Gram
from resting.sparsifier.weights import check_weights

DAMPING = 0.01
"""Share of the mean of the second moment's diagonal that is added to it."""
RUN = 64
"""Inputs after which what is still to come is moved all at once."""


@torch.no_grad()
def quantise_compensated(calibrated: CalibratedModel, format: Format) -> dict[Site, QuantisedWeight]:
    """Replaces the block linears of a model as `quantise` does, with codes that make up for one another's errors.

    Blocks come in turn, and in a block what its layers read; second moments are those of inputs that the quantised
    layers before have given. An output layer has the nearest codes.

    Raises
    ------
    SparsifierError
        As `quantise`; also for a model with experts, or whose blocks do not run one after another.
    """
    decoder = calibrated.decoder
    check_weights(decoder)
    check(calibrated.model, decoder, format)
    stream = BlockStream(calibrated)
    found: dict[Site, QuantisedWeight] = {}
    for block in range(decoder.blocks):
        for group in stages([site for site in decoder.matrices if site.block == block]):
            gram = Gram()
            for seen in stream.inputs([group[0]], {}):
                gram.add(seen[group[0]])
            for site in group:
                weight = decoder.projection(site).weight
                found[site] = compensated(weight, gram.second_moment, format)
                weight.copy_(found[site].dequantised().T)
        stream.advance({})
        calibrated.on_progress("quantise", block + 1, decoder.blocks, "blocks")
    keep(calibrated.model, format, found)
    return found


def compensated(weight: Tensor, second_moment: Tensor, format: Format) -> QuantisedWeight:
    r"""Rounds a matrix so that its outputs, and not its weights, are near.

    .. math:: \min_Q \; \mathrm{tr} (W - Q) H (W - Q)^T, \qquad H = E[x x^T] + \lambda I

    Inputs with large second moments come first, while there is most left to make up for them.

    Parameters
    ----------
    weight : Tensor [outputs, inputs]
    second_moment : Tensor [inputs, inputs]
        Of its inputs.
    format : Format

    Raises
    ------
    DivergedError
        If the second moment is not finite.
    """
    rows = weight.detach().T.double()
    inputs, outputs = rows.shape
    moment = second_moment.to(rows)
    if not bool(torch.isfinite(moment).all()):
        raise DivergedError("second moments of inputs are NaN or infinite on the calibration text")
    mean = moment.diagonal().mean()
    moment = moment + (DAMPING * mean if float(mean) > 0 else 1.0) * torch.eye(inputs).to(moment)
    order = moment.diagonal().argsort(descending=True)
    rows = rows[order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    groups = groups_of(outputs, format)
    kind = scales_and_zeros(rows.float().view(inputs, groups, format.group), format)[0].dtype
    codes = torch.empty(inputs, outputs, dtype=torch.int8, device=rows.device)
    scales = torch.empty(inputs, groups, dtype=kind, device=rows.device)
    zeros = torch.empty(inputs, groups, dtype=torch.int8, device=rows.device) if format.zero else None
    for first in range(0, inputs, RUN):
        last = min(first + RUN, inputs)
        errors = torch.empty(last - first, outputs).to(rows)
        for i in range(first, last):
            grouped = rows[i : i + 1].float().view(1, groups, format.group)
            scale, zero = scales_and_zeros(grouped, format, kind)
            code = nearest(grouped, scale[..., None], None if zero is None else zero[..., None], format)
            one = QuantisedWeight(format, code.view(1, outputs), scale, zero)
            codes[i], scales[i] = one.codes[0], scale[0]
            if zeros is not None and zero is not None:
                zeros[i] = zero[0]
            errors[i - first] = (rows[i] - one.dequantised()[0]) / factor[i, i]
            rows[i + 1 : last] -= torch.outer(factor[i, i + 1 : last], errors[i - first])
        rows[last:] -= factor[first:last, last:].T @ errors
    back = order.argsort()
    return QuantisedWeight(format, codes[back], scales[back], None if zeros is None else zeros[back])
