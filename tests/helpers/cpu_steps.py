"""The step of a CPU on tiny models of every form, beside the masked definition, and rules of every kind."""

from __future__ import annotations

import math

import torch
from decoders import plan_of
from plain_step import tiny
from transformers import DynamicCache

from resting.sparsifier import ACT, AllButFirst, Decoder, Rule, Site
from resting.sparsifier.decoding.step.cpu_step import CpuStep
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.decoding.step.store import Store

WINDOW = 4
IDS = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(5))
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def model_of(family, dtype=torch.float32, **more):
    """A tiny model with windows shorter than the text, and with gains and biases that are not neutral."""
    more |= {"sliding_window": WINDOW} if family in ("mistral", "gemma2", "gemma3_text", "olmo3", "exaone4") else {}
    more |= {"residual_multiplier": 0.4, "embedding_multiplier": 3.0} if family == "granite" else {}
    more |= {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = tiny(family, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def thresholds(model, threshold=0.4):
    sites = Decoder.of(model).sites()
    return {site: Rule(threshold=threshold * (1 + i % 3 / 4)) for i, site in enumerate(sites)}


@torch.no_grad()
def defined(model, rules, ids=IDS):
    """Logits of one token after the other, all of them sparse, by the model's own forward."""
    with plan_of(model, rules).applied(model, AllButFirst(0)):
        cache = DynamicCache(config=model.config)
        return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


def step_of(model, rules, threads=1):
    decoder = Decoder.of(model)
    form = read(model, decoder)
    shapes = [(b.attention.groups, b.attention.size, b.attention.size) for b in form.blocks]
    store = Store(shapes, next(model.parameters()).dtype, "cpu")
    for kept in (*store.keys, *store.values):
        kept.fill_(math.nan)  # what a step may not read
    return CpuStep(model, form, decoder, rules, store, threads)


def stepped(step, ids=IDS):
    return torch.cat([step(token, i).clone() for i, token in enumerate(ids.split(1, 1))], 1)


def off(found, wanted):
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def typical(found, wanted):
    return float((found.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())


def vector(n, seed, scale=1.0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def each(model, make, roles=ROLES):
    """A rule for every block and role, from its numbers of outputs and inputs."""
    decoder = Decoder.of(model)
    sites = [Site(i, role) for i in range(decoder.blocks) for role in roles if Site(i, role) in decoder.slots]
    return {site: make(*decoder.projection(site).weight.shape, ROLES.index(site.role)) for site in sites}


def gates(model, threshold=0.1):
    width = Decoder.of(model).projection(Site(0, "down")).in_features
    scale = vector(width, 3).abs()
    return {Site(i, ACT): Rule(threshold=threshold, scale=scale) for i in range(Decoder.of(model).blocks)}


def low_rank(out, inputs, seed):
    return vector((out, 3), seed, 0.2), vector((3, inputs), seed + 1, 0.2)


RULES = {
    "biases": lambda m: each(m, lambda out, _, s: Rule(threshold=0.3, bias=vector(out, s, 0.2))),
    "shifts": lambda m: each(m, lambda out, n, s: Rule(0.3, shift=vector(n, s, 0.2), bias=vector(out, s, 0.2))),
    "one shift": lambda m: each(m, lambda *_: Rule(0.3, shift=0.1)),
    "low rank": lambda m: each(m, lambda out, n, s: Rule(0.5, low_rank=low_rank(out, n, s), bias=vector(out, s, 0.1))),
    "scales": lambda m: each(m, lambda out, n, s: Rule(0.3, scale=vector(n, s).abs().clamp(min=0.1))),
    "a threshold each": lambda m: each(m, lambda out, n, s: Rule(threshold=vector(n, s).abs())),
    "all rests": lambda m: each(m, lambda *_: Rule(threshold=math.inf), ("o", "down")),
    "gates": gates,
    "gates, and all": lambda m: each(m, lambda out, n, s: Rule(0.3, shift=0.1, bias=vector(out, s, 0.2))) | gates(m),
}
