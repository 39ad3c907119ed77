"""Implements CATS, contextually aware thresholding for sparsity (Lee et al., 2024, arXiv 2404.08763)."""

from __future__ import annotations

from typing import ClassVar

from resting.sparsifier import ACT, AllButFirst, Original, Rule, Site, Sparsifier, Statistics


class Cats(Sparsifier):
    r"""Masks the activated gate by a magnitude threshold.

    .. math::
        v = \mathrm{SiLU}(W_{gate} x), \qquad keep_i = |v_i| > t, \qquad t = F^{-1}_{|v|}(k), \qquad
        y = W_{down} \, ((W_{up} x) \odot v \odot keep)

    Rows of up and columns of down rest together; gate and attention stay dense, so that the byte sparsity of a block
    has a ceiling, the share of up and down (45 % of a Llama-2-7B block, 54 % of a Llama-3-8B one). The authors read
    the quantile off 999 bins, which lets up to one bin less rest; here bins are a 256th of a power of two wide. Two
    more of their code's ways are not followed: its bins end at 1, so that no threshold is above 1, and the padding of
    calibration sequences is counted, except where a batch is nearly all padding.
    """

    name: ClassVar[str] = "cats"
    paper: ClassVar[str] = "Lee et al. 2024, arXiv 2404.08763"
    roles: ClassVar[tuple[str, ...]] = (ACT,)
    original: ClassVar[Original] = Original(
        windows=100,
        window=1024,
        tokens=AllButFirst(0),
        text="RefinedWeb (tiiuae/falcon-refinedweb)",
        source="released code, ScalingIntelligence/CATS 679959c; the paper says 500 sequences",
    )

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].quantile(ratio))
