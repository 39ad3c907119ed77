"""Gives every site the same ratio."""

from __future__ import annotations

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import TargetUnreachableError
from resting.sparsifier.roles import ACT
from resting.sparsifier.sites import Site


def coverage(decoder: Decoder, site: Site) -> float:
    """Counts the weights that a token leaves unread when all inputs of `site` rest: at `ACT` those of up and down."""
    if site.role != ACT:
        return decoder.elements_at(site)
    return sum(share * decoder.elements_at(under) for under, share in decoder.rests_under_act(site).items())


def uniform(decoder: Decoder, roles: tuple[str, ...], target: float) -> dict[Site, float]:
    """Gives all sites with one of `roles` one ratio, such that a share `target` of all block weights rests.

    Raises
    ------
    TargetUnreachableError
        If the sites do not hold so many weights (CATS: 45 to 58 % of a block).
    """
    sites = decoder.sites(roles)
    covered, total = sum(coverage(decoder, site) for site in sites), decoder.elements
    if not sites and target == 0:
        return {}
    if target * total > covered:
        raise TargetUnreachableError(
            f"byte sparsity {target:g} is above this method's ceiling of {covered / total:.3f} on this model"
        )
    return dict.fromkeys(sites, target * total / covered)
