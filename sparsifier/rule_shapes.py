"""Checks that rules fit the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import torch

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site

VECTORS = ("threshold", "scale", "shift", "bias")
_VECTORS = attrgetter(*VECTORS)


def check_rules(rules: Mapping[Site, Rule], decoder: Decoder) -> None:
    """Refuses a rule at a site that the model does not have, or whose tensors have other shapes than its matrix.

    Raises
    ------
    PlanError
    """
    for site, rule in rules.items():
        if site not in decoder.slots:
            raise PlanError(f"the plan has a rule at {site}, where this model has no site")
        matrix = decoder.projection(site._replace(role="down") if site.role == ACT else site)
        needed = [matrix.out_features, matrix.in_features]
        for name, value in zip(VECTORS, _VECTORS(rule)):
            if isinstance(value, torch.Tensor) and value.dim():
                width = needed[0] if name == "bias" else needed[1]
                if len(value) != width:
                    raise PlanError(f"{name} at {site} has {len(value)} entries, the model needs {width}")
        if site.role == ACT and (rule.extra_elements() or rule.rescale or rule.weight is not None or rule.shifts):
            raise PlanError(
                f"a rule at {site} masks an activation: it takes no bias, no low_rank, no weight, no shift and no "
                "rescale"
            )
        if rule.weight is not None and list(rule.weight.shape) != needed:
            raise PlanError(f"weight at {site} is {list(rule.weight.shape)}, the model needs {needed}")
        if rule.low_rank is not None:
            shape = [rule.low_rank[0].shape[0], rule.low_rank[1].shape[1]]
            if shape != needed:
                raise PlanError(f"low_rank at {site} is {shape}, the model needs {needed}")
