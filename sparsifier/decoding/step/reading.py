"""Reads the form of a model off its modules, and verifies it against what the model computes.

Nothing is known of classes: what modules are called and what they hold gives candidates, and a form stands only if it
gives what the model's own blocks give.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.step import plain
from resting.sparsifier.decoding.step.form import ACTIVATIONS, AttentionForm, BlockForm, ModelForm, Norm, Table
from resting.sparsifier.decoding.step.running import (
    TOKENS,
    Run,
    UnknownFormError,
    check_attention,
    eager,
    windows_of,
)
from resting.sparsifier.decoding.step.unchanged import Hooks
from resting.sparsifier.sites import Site

FAR = 1_000_003
"""A position far off, where another rotary table would show."""
TOLERANCE = 2e-4
"""Of float32, relative to the largest number."""
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
ROLES: tuple[tuple[str, ...], ...] = (("q", "k", "v", "o", "gate", "up", "down"), ("qkv", "o", "gate_up", "down"))
ROLES += (("qkv", "o", "gate", "up", "down"), ("q", "k", "v", "o", "gate_up", "down"))
CHANGING = ("dynamic", "longrope", "yarn_dynamic")
"""Rotary tables that depend on how long a sequence is."""
NORMS = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
"""Names of norms; Llama calls the one before the MLP as others call the one after attention."""


@torch.no_grad()
def read(model: nn.Module, decoder: Decoder) -> ModelForm:
    """Reads the form of a model.

    Parameters
    ----------
    model : nn.Module
        As it is, without masks.
    decoder : Decoder
        Of it.

    Raises
    ------
    UnknownFormError
        If the model computes anything else than a form says.
    """
    try:
        return _read(model, decoder)
    except UnknownFormError:
        raise
    except Exception as error:  # it has not what a form is read off
        raise UnknownFormError(f"the step cannot read {type(model).__name__}: {error}") from error


def _is_optimised(model: Any) -> bool:
    """Whether it is what `torch.compile` gave; where dynamo is not imported, which takes a second, nothing is."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def _read(model: Any, decoder: Decoder) -> ModelForm:
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    trunk: Any = decoder.trunk
    if _is_optimised(model) or model._compiled_call_impl is not None:
        raise UnknownFormError("it is compiled as a whole, which a step would pass by")
    if where := Hooks(model).where():
        raise UnknownFormError(f"{where} has a hook or a forward of its own, which a step would pass by")
    kinds = {(str(p.device), str(p.dtype)) for p in model.parameters()}
    if len(kinds) > 1:
        places = "; ".join(f"{dtype} on {device}".removeprefix("torch.") for device, dtype in sorted(kinds))
        raise UnknownFormError(f"its parameters are not of one dtype on one device: {places}")
    check_attention(config)
    run = Run.of(model, decoder)
    run.check_between(decoder.blocks)
    tables = _tables(trunk)
    windows = windows_of(model, config, decoder)
    blocks = []
    for i in range(decoder.blocks):
        with _eagerly(decoder.layers[i]):
            blocks.append(_block(decoder, i, config, tables, windows[i]))
    norm = _norm(trunk.norm if hasattr(trunk, "norm") else None, "the last norm")
    form = ModelForm(blocks, dict(tables), norm)
    return _finished(form, model, config, run)


def _tables(trunk: Any) -> dict[str, Table]:
    """Makes the rotary tables, by layer type where a model has several."""
    rotary = getattr(trunk, "rotary_emb", None)
    if rotary is None:
        raise UnknownFormError("it has no rotary embedding")
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    for kind in kinds.values():
        if kind in CHANGING:
            raise UnknownFormError(f"its rotary embedding, {kind}, changes with the length of a sequence")
    like = trunk.embed_tokens.weight
    typed = "layer_type" in inspect.signature(rotary.forward).parameters

    def table(of: str) -> Table:
        def at(positions: Tensor) -> tuple[Tensor, Tensor]:
            more = (of,) if typed else ()
            cos, sin = rotary(like[:1, None], positions[None].to(like.device), *more)
            return cos[0], sin[0]

        return at

    return {of: table(of) for of in (kinds if typed else [""])}


@contextmanager
def _eagerly(layer: Any) -> Iterator[None]:
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if config is None:
        raise UnknownFormError(f"a block, {type(layer).__name__}, has no attention that tells its config")
    with eager(config):
        yield


def roles_of(decoder: Decoder, block: int) -> tuple[str, ...]:
    """Lists the roles of a block's matrices, where they are those of attention and one gated MLP.

    Raises
    ------
    UnknownFormError
    """
    found = decoder.found[block]
    here = {role for part, role in found.projections if part == ""}
    for roles in ROLES:
        if here == set(roles) and len(found.projections) == len(roles) and not found.dense:
            return roles
    names = ", ".join(sorted(here)) or "no matrix of its own"
    raise UnknownFormError(f"block {block} has {names}: not attention and one gated MLP alone")


def _block(decoder: Decoder, i: int, config: Any, tables: dict[str, Table], window: int | None) -> BlockForm:
    """Reads a block: the first of its candidates that gives what the block gives."""
    layer: Any = decoder.layers[i]
    roles = roles_of(decoder, i)
    reasons = []
    for form in _candidates(layer, config, i, tables, window):
        worst = max(_difference(decoder, i, roles, form, tables, start) for start in (0, FAR))
        if worst <= TOLERANCE:
            return form
        reasons.append(worst)
    if not reasons:
        raise UnknownFormError(f"block {i}, {type(layer).__name__}, fits none of the known forms")
    raise UnknownFormError(
        f"block {i}, {type(layer).__name__}, does not compute what its form says: "
        f"it is off by {min(reasons):.1e} of the largest number"
    )


def _candidates(layer: Any, config: Any, i: int, tables: dict[str, Table], window: int | None) -> Iterator[BlockForm]:
    attention = layer.self_attn
    activation = _activation(layer)
    pre = {name: getattr(layer, known, None) for name, known in NORMS.items()}
    if pre["before_mlp"] is None and pre["before_attention"] is not None and pre["after_mlp"] is None:
        pre["before_mlp"], pre["after_attention"] = pre["after_attention"], None
    norms = {name: None if m is None else _norm(m, f"block {i}'s {name}") for name, m in pre.items()}
    size = int(attention.head_dim)
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    heads, groups = (int(getattr(config, f"num_{name}_heads")) for name in ("attention", "key_value"))
    types = getattr(config, "layer_types", None)
    form = AttentionForm(
        heads=heads,
        groups=groups,
        size=size,
        scaling=float(attention.scaling),
        rotary=0,
        table="",
        window=window,
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        q_norm=None if q_norm is None else _norm(q_norm, f"block {i}'s q_norm"),
        k_norm=None if k_norm is None else _norm(k_norm, f"block {i}'s k_norm"),
        norm_of_all=q_norm is not None and q_norm.weight.numel() == heads * size and heads > 1,
    )
    norms_of_heads = form.q_norm, form.k_norm
    if any(norm is None for norm in norms_of_heads) != all(norm is None for norm in norms_of_heads) or (
        form.q_norm is not None and form.k_norm is not None and _kind(form.q_norm) != _kind(form.k_norm)
    ):
        raise UnknownFormError(f"block {i} has norms of queries and of keys that differ")
    residual = float(getattr(layer, "residual_multiplier", 1.0))
    named = types[i] if types is not None and types[i] in tables else None
    for table in [named] if named is not None else list(tables):
        turned = replace(form, table=table, rotary=tables[table](torch.zeros(1).long())[0].shape[-1])
        yield BlockForm(turned, activation, residual=residual, **norms)
    yield BlockForm(replace(form, table=next(iter(tables))), activation, residual=residual, **norms)


def _activation(layer: Any) -> str:
    module = getattr(layer.mlp, "act_fn", None) or getattr(layer.mlp, "activation_fn", None)
    if module is None:
        raise UnknownFormError("the activation of its gate is no module of its own")
    x = torch.linspace(-6.0, 6.0, 97)
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(module(x), activation(x), rtol=1e-6, atol=1e-6):
            return name
    raise UnknownFormError(f"it opens a gate by {type(module).__name__}, not by {', '.join(ACTIVATIONS)}")


def _norm(module: Any, name: str) -> Norm:
    """Finds out how a norm computes and rounds, by what it does with numbers of its own dtype."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
    if weight is None or eps is None:
        raise UnknownFormError(f"{name} is no RMSNorm with a weight")
    x = torch.linspace(-3.0, 3.0, weight.numel(), device=weight.device)
    x = (x * torch.cos(17.0 * x)).to(weight.dtype)[None]
    given = module(x)
    candidates = [Norm(module, float(eps), offset, first) for offset, first in ((0.0, True), (0.0, False))]
    candidates.append(Norm(module, float(eps), 1.0, False))
    for norm in candidates:
        if torch.equal(norm(x), given):
            return norm
    bound = TOLERANCE if weight.dtype == torch.float32 else 2 * torch.finfo(weight.dtype).eps
    for norm in candidates:
        if _off(norm(x), given) <= bound:
            return norm
    raise UnknownFormError(f"{name}, {type(module).__name__}, is no RMSNorm")


def _kind(norm: Norm) -> tuple[float, float, bool]:
    return norm.eps, norm.offset, norm.rounds_first


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-20))


def _difference(
    decoder: Decoder, i: int, roles: tuple[str, ...], form: BlockForm, tables: dict[str, Table], start: int
) -> float:
    """Compares a form with its block, both in float32, on a few tokens from position `start` on."""
    layer: Any = decoder.layers[i]
    numbers = {name: p.detach().float() for name, p in layer.named_parameters()}
    width, device = next(iter(decoder.found[i].projections.values())).in_features, next(layer.parameters()).device
    names = {id(p): name for name, p in layer.named_parameters()}
    layers: dict[str, plain.Layer] = {}
    attention = form.attention
    for role in roles:
        matrix = decoder.projection(Site(i, role))
        if matrix.transposed:
            raise UnknownFormError(f"block {i} holds its weights [in, out]")
        weight = numbers[names[id(matrix.module.weight)]]
        bias = None if matrix.bias is None else numbers[names[id(matrix.bias)]]
        widths = [n * attention.size for n in (attention.heads, attention.groups, attention.groups)]
        if role == "gate_up":
            widths = [weight.shape[0] // 2] * 2
        if role in FUSED:
            if sum(widths) != weight.shape[0]:
                raise UnknownFormError(f"block {i}'s {role} has {weight.shape[0]} outputs, not {sum(widths)}")
            biases = [None] * len(widths) if bias is None else bias.split(widths)
            layers |= {r: (w, b) for r, w, b in zip(FUSED[role], weight.split(widths), biases)}
        else:
            layers[role] = (weight, bias)
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(TOKENS, width, generator=generator).to(device)
    positions = torch.arange(start, start + TOKENS, device=device)
    cos, sin = (t.float() for t in tables[attention.table](positions))
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).tril()
    if attention.window is not None:
        seen &= torch.ones_like(seen).triu(1 - attention.window)
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)
    more = {"attention_mask": mask, "position_ids": positions[None], "position_embeddings": (cos[None], sin[None])}
    given = functional_call(layer, numbers, (x[None],), more)
    found = plain.block(form, layers, x, cos, sin)
    given = given[0] if isinstance(given, tuple) else given
    return max(_off(found, given[0]), _off(found - x, given[0] - x) / 4)


def _finished(form: ModelForm, model: Any, config: Any, run: Run) -> ModelForm:
    """Reads what is before the first block and after the last one."""
    assert run.logits is not None
    head = model.get_output_embeddings()
    is_linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not is_linear or run.normed is None:
        raise UnknownFormError("it has no plain linear output layer after its blocks")
    rounding = max(TOLERANCE, 4 * torch.finfo(run.normed.dtype).eps)
    if _off(form.norm(run.out[-1][0]), run.normed[0] if run.normed.dim() == 3 else run.normed) > rounding:
        raise UnknownFormError("what follows its last block is not one norm")
    raw = head(run.normed if run.normed.dim() == 3 else run.normed[None])[0].float()
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    form = replace(form, logits_divisor=divisor, logits_softcap=softcap)
    if _off(form.finished(raw), run.logits) > rounding:
        raise UnknownFormError("its logits are not what its output layer gives")
    scale = _scale_of(run)
    return replace(form, embedding_scale=scale)


def _scale_of(run: Run) -> float:
    """Finds what embeddings are multiplied by before the first block, outside of the embedding's own module."""
    assert run.embedded is not None
    if torch.equal(run.embedded, run.into[0]):
        return 1.0
    before, after = (t.detach().cpu().flatten() for t in (run.embedded, run.into[0]))
    before, after = before[before != 0], after[before != 0]
    # What is rounded to `after` lies half way to its neighbours at most: all numbers together say more than one.
    ends = [
        (after.double() + torch.nextafter(after, torch.full_like(after, end)).double()) / 2 / before.double()
        for end in (-torch.inf, torch.inf)
    ]
    low, high = torch.minimum(*ends).max(), torch.maximum(*ends).min()
    scale = float(low + high) / 2
    if _off(run.embedded * scale, run.into[0]) > max(TOLERANCE, 4 * torch.finfo(run.embedded.dtype).eps):
        raise UnknownFormError("what goes into its first block is not its embedding of tokens, times a number")
    return scale
