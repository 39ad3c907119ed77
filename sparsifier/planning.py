"""Makes a plan of what a method decides, site by site."""

from __future__ import annotations

from typing import Any

from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.plan import Plan


def plan_of(method: Any, calibrated: CalibratedModel, nominal: float) -> Plan:
    """Asks `method`, a `Sparsifier`, for the ratio and the rule of every site, and makes the plan of its answers."""
    calibrated.decoder.check_roles(method.roles)
    ratios, statistics = method.ratios(calibrated, nominal), method.statistics(calibrated)
    rules = {site: method.rule_or_topk(site, statistics, ratio) for site, ratio in ratios.items()}
    info: dict[str, Any] = {"ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()}}
    if statistics.rare:  # statistics of all experts together stand in for theirs
        info["experts_with_few_tokens"] = len({(site.block, site.part) for site in statistics.rare})
    return Plan(rules, method.label, method.target, nominal, *calibrated.identity, info, transform=calibrated.transform)
