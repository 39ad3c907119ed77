"""Gives deeper blocks more, or less, of the same total."""

from __future__ import annotations

from collections.abc import Mapping

from resting.sparsifier.allocation.uniform import coverage, uniform
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.sites import Site


def slope(decoder: Decoder, target: float, rise: float) -> dict[int, float]:
    r"""Divides a model-wide byte sparsity over blocks along a line in depth.

    .. math:: s_l = r + a \left( \frac{2 l}{L - 1} - 1 - c \right)

    with l the block and L their number, r the `target`, a the `rise`, and c the mean of the line over the blocks'
    weights: 0 where all blocks are alike. The mean over the weights so is r. A rise that would lead below 0 or above 1
    is shortened. (The idea is WAS's, whose ratios do not fall with depth; the line is this project's.)

    Parameters
    ----------
    decoder : Decoder
    target : float
        In [0, 1].
    rise : float
        The last block's ratio less the mean's; negative where deeper blocks get less.

    Returns
    -------
    dict of int to float
        The share of its weight bytes that each block leaves unread.
    """
    count = decoder.blocks
    line = [2.0 * i / max(1, count - 1) - 1.0 for i in range(count)]
    weights = [decoder.elements_in(i) for i in range(count)]
    centre = sum(at * weight for at, weight in zip(line, weights)) / sum(weights)
    apart = [at - centre for at in line]
    room = min(target, 1.0 - target)
    furthest = max(abs(at) for at in apart)
    rise = max(-room, min(room, rise * furthest)) / furthest if furthest else 0.0
    return {i: target + rise * at for i, at in enumerate(apart)}


def in_blocks(decoder: Decoder, roles: tuple[str, ...], targets: Mapping[int, float]) -> dict[Site, float]:
    """Gives the sites of a block one ratio, such that the share `targets` has for it of its weights rests.

    Raises
    ------
    TargetUnreachableError
        If the sites of all blocks do not hold as many weights as the targets ask for together. A block whose own sites
        hold too few has a ratio of 1.
    """
    total = decoder.elements
    uniform(decoder, roles, sum(targets[i] * decoder.elements_in(i) for i in targets) / total)
    covered = dict.fromkeys(targets, 0.0)
    sites = decoder.sites(roles)
    for site in sites:
        covered[site.block] += coverage(decoder, site)
    wanted = {i: target * decoder.elements_in(i) for i, target in targets.items()}
    return {site: min(1.0, wanted[site.block] / covered[site.block]) for site in sites}
