"""Methods that choose neurons or channels once, against oracles written from their formulas."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from itertools import pairwise

import oracle
import pytest
import torch
from decoders import CALIBRATION, decoder_of
from torch.nn import functional as F

from resting.baselines.clusters import Clusters, assigned, codebook, largest_sets, linear_head, shares, token_weights
from resting.baselines.countdown import CountdownM
from resting.baselines.griffin import Griffin
from resting.baselines.oracle import Oracle
from resting.baselines.proxy import Proxy
from resting.baselines.static import Static
from resting.baselines.static_neurons import StaticNeurons
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import (
    ACT,
    NEURONS,
    AllButFirst,
    CalibratedModel,
    Calibration,
    DecodeOnly,
    Decoder,
    LastFraction,
    Meter,
    NeuronMask,
    Plan,
    Rule,
    Site,
    SparsifierError,
    TargetUnreachableError,
    fingerprint,
    masked,
)
from resting.sparsifier.neurons.proxy import rounded

WIDTH, HIDDEN, BLOCKS = 48, 32, 3
MLP = 3 * WIDTH * HIDDEN


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def sparse(plan, model, ids, tokens=None):
    meter = Meter()
    with plan.applied(model, tokens or AllButFirst(1), meter):
        return logits(model, ids), meter.byte_sparsity()


def whole(model):
    return sum(module.weight.numel() for module in oracle.linears(model).values())


def seen(model, windows, dense=1):
    """By block: x, gate and up of all tokens after the first, of the dense model."""
    found = {}
    with ExitStack() as stack:
        for (block, role), module in oracle.linears(model).items():
            if role in ("gate", "up"):
                hook = lambda m, a, y, key=(block, role): found.update({key: y, (key[0], "x"): a[0]})  # noqa: E731
                stack.callback(module.register_forward_hook(hook).remove)
        logits(model, windows)
    return {key: value[:, dense:].flatten(0, 1) for key, value in found.items()}


def norms(model, block):
    return oracle.linears(model)[block, "down"].weight.detach().norm(dim=0)


@pytest.fixture
def text(calibration):
    return calibration.windows[: calibration.statistics_windows]


@pytest.mark.parametrize("scaled", [False, True])
def test_countdown_is_the_pooled_quantile_of_up(scaled, llama, ids, calibration, text):
    plan = CountdownM(0.2, scaled=scaled).plan_at(CalibratedModel(llama, calibration), 0.2)
    share = 0.2 * whole(llama) / (2 / 3 * MLP * BLOCKS)
    dense = seen(llama, text)
    for block in range(BLOCKS):
        mask = plan.neurons[Site(block, NEURONS)]
        scale = torch.ones(WIDTH)
        if scaled:
            scale = F.silu(dense[block, "gate"]).abs().mean(0) * norms(llama, block)
            scale = scale / scale.max()
            torch.testing.assert_close(mask.scale, scale, rtol=1e-4, atol=1e-6)
        pooled = (dense[block, "up"].abs() * scale).flatten()
        assert mask.threshold == pytest.approx(float(pooled.quantile(share)), rel=0.01)
    assert sparse(CountdownM(0.2, scaled=scaled).fit(llama, calibration), llama, text)[1] == pytest.approx(
        0.2, abs=0.01
    )


def test_countdown_with_gate_and_up_exchanged_is_cats_where_the_activation_is_linear(llama, ids):
    """CATS keeps |gate| > t and rests up and down; COUNTDOWN keeps |up| > t and rests gate and down."""
    exchanged = copy.deepcopy(llama)
    for model in (llama, exchanged):
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Identity()
    for layer in exchanged.model.layers:
        mlp = layer.mlp
        mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    rules = {Site(block, ACT): Rule(threshold=0.4) for block in range(BLOCKS)}
    masks = {Site(block, NEURONS): NeuronMask("up", 0.4) for block in range(BLOCKS)}
    cats = sparse(Plan(rules, "cats", 0.3, 0.3, fingerprint.of_model(llama)), llama, ids)
    down = sparse(Plan({}, "m", 0.3, 0.3, fingerprint.of_model(exchanged), neurons=masks), exchanged, ids)
    torch.testing.assert_close(down[0], cats[0], rtol=1e-5, atol=1e-5)
    assert down[1] == pytest.approx(cats[1], abs=1e-9)
    assert 0.1 < down[1] < 0.5


def test_griffin_needs_no_text_and_a_prompt(llama, ids, calibration):
    prompted = Calibration(calibration.windows[:2], tokens=DecodeOnly())  # windows are all prompt: nothing to measure
    plan = Griffin(0.3).fit(llama, prompted)
    assert plan.info["matched"] == pytest.approx(0.3)
    out, unread = sparse(plan, llama, ids, DecodeOnly(5))
    assert unread == pytest.approx(0.3, abs=0.007)
    assert not torch.equal(out, logits(llama, ids))
    with pytest.raises(SparsifierError, match="griffin makes its neuron masks from a dense prompt, and"):
        Griffin(0.3).fit(llama, calibration)


def test_the_prior_s_ranks_are_mixed_with_the_prompt_s(llama, ids, calibration, text):
    prompted = Calibration(calibration.windows, statistics_windows=16, tokens=LastFraction(0.5))
    fitted = CalibratedModel(llama, prompted)
    plans = {share: Griffin(0.3, prior=share).plan_for(fitted) for share in (0.0, 0.5, 1.0)}
    dense = seen(llama, text)
    fixed = {}
    for block in range(BLOCKS):
        z = (F.silu(dense[block, "gate"]) * dense[block, "up"]).double()
        s = (z / z.norm(dim=1, keepdim=True)).square().sum(0).sqrt()
        mask = plans[0.0].neurons[Site(block, NEURONS)]
        torch.testing.assert_close(mask.tensors["prior"].double(), s, rtol=1e-4, atol=1e-6)
        keep = torch.zeros(WIDTH).scatter(0, s.topk(mask.kept).indices, 1.0)
        fixed[Site(block, NEURONS)] = NeuronMask("fixed", tensors={"keep": keep})
    static = Plan({}, "fixed", 0.3, 0.3, plans[0.0].model, neurons=fixed)
    half = LastFraction(0.5)
    assert torch.equal(sparse(plans[0.0], llama, ids, half)[0], sparse(static, llama, ids, half)[0])
    bare = Griffin(0.3).plan_for(fitted)
    assert torch.equal(sparse(plans[1.0], llama, ids, half)[0], sparse(bare, llama, ids, half)[0])
    assert not torch.equal(sparse(plans[0.5], llama, ids, half)[0], sparse(bare, llama, ids, half)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_a_static_mask_folds_into_the_weights(bias, llama, ids, calibration, text):
    method = Static(0.3, bias=bias, importance="variance" if bias else "relative")
    plan = method.fit(llama, calibration)
    out, unread = sparse(plan, llama, ids, AllButFirst(0))
    elements = sum(len(rule.bias) for rule in plan.rules.values()) if bias else 0
    resting = sum(
        float((rule.scale == 0).double().mean()) * oracle.linears(llama)[site.block, site.role].weight.numel()
        for site, rule in plan.rules.items()
    )
    assert unread == pytest.approx((resting - elements) / whole(llama), abs=1e-9)
    assert unread == pytest.approx(0.3, abs=0.02)  # a channel of 32 is 0.03 of a layer
    folded, means = copy.deepcopy(llama), inputs(llama, text)
    for (block, role), module in oracle.linears(folded).items():
        rule = plan.rules[Site(block, role)]
        x, weight = means[block, role].double(), module.weight.detach().double()
        score = x.abs() * weight.norm(dim=0)
        score = (score / score.sum(1, keepdim=True)).mean(0)
        if bias:
            score = x.var(0, correction=0) * weight.square().sum(0)
        expected = torch.zeros(len(score)).scatter(0, score.topk(int(rule.scale.sum())).indices, 1.0)
        assert torch.equal(rule.scale, expected)
        with torch.no_grad():
            if bias:
                added = weight @ (x.mean(0) * (1 - expected))
                torch.testing.assert_close(rule.bias.double(), added, rtol=1e-4, atol=1e-5)
                module.bias = torch.nn.Parameter(added.float())
            module.weight *= expected
    torch.testing.assert_close(out, logits(folded, ids), rtol=1e-4, atol=1e-4)


def inputs(model, windows):
    found = {}
    with ExitStack() as stack:
        for key, module in oracle.linears(model).items():
            hook = lambda m, a, key=key: found.update({key: a[0][:, 1:].flatten(0, 1)})  # noqa: E731
            stack.callback(module.register_forward_pre_hook(hook).remove)
        logits(model, windows)
    return found


def test_static_channels_are_the_same_for_all_tokens_where_many_inputs_are_zero():
    """After a ReLU kept channels are often zero; no other channel may take their place."""
    model = decoder_of("opt")
    calibrated, site = CalibratedModel(model, CALIBRATION), Site(0, "down")
    for topk in (True, False):
        rule = Static(0.5, topk=topk).plan_at(calibrated, 0.5).rules[site]
        x = torch.rand(64, 48, generator=torch.Generator().manual_seed(2)).sub_(0.7).relu_()
        assert torch.equal(masked(x, rule), x * rule.scale)
        assert int(rule.scale.sum()) == 24


def test_static_neurons_fold_into_narrower_matrices(llama, ids, calibration, text):
    plan = StaticNeurons(0.3).fit(llama, calibration)
    out, unread = sparse(plan, llama, ids, AllButFirst(0))
    narrow, dense = copy.deepcopy(llama), seen(llama, text)
    for block, layer in enumerate(narrow.model.layers):
        importance = (F.silu(dense[block, "gate"]) * dense[block, "up"]).abs().mean(0) * norms(llama, block)
        kept = plan.neurons[Site(block, NEURONS)].tensors["keep"].nonzero()[:, 0]
        assert set(kept.tolist()) == set(importance.topk(len(kept)).indices.tolist())
        mlp = layer.mlp
        with torch.no_grad():
            mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight[kept])
            mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight[kept])
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, kept])
    torch.testing.assert_close(out, logits(narrow, ids), rtol=1e-4, atol=1e-4)
    assert unread == pytest.approx(1.0 - whole(narrow) / whole(llama))


WEIGHTS = torch.rand(60, WIDTH, generator=torch.Generator().manual_seed(5)) ** 4


def clustered(count, kept=20, restarts=2, weights=WEIGHTS):
    return codebook(weights, kept, count, restarts, torch.Generator().manual_seed(0))


def test_the_objective_of_clusters_never_falls_and_is_what_it_says():
    last = 0.0
    for count in (1, 2, 5, 12):
        book, objective = clustered(count)
        assert all(after >= before * (1 - 1e-6) for before, after in pairwise(objective))
        assert (book.sum(1) == 20).all()
        by_hand = sum(max(float(row[chosen].sum()) for chosen in book) for row in WEIGHTS)
        assert by_hand >= objective[-1] * (1 - 1e-5)
        assert by_hand > last
        last = by_hand


def test_one_set_is_a_static_mask_and_as_many_as_tokens_the_oracle():
    (only,), _ = clustered(1)
    assert set(only.nonzero()[:, 0].tolist()) == set(WEIGHTS.sum(0).topk(20).indices.tolist())
    book, _ = clustered(len(WEIGHTS))
    assert torch.equal(book[assigned(WEIGHTS, book)], largest_sets(WEIGHTS, 20))


def test_clusters_of_a_model(llama, ids, calibration, text):
    """With a set for each token of the text the model runs as under the oracle; and a token keeps exactly k neurons."""
    few = Calibration(calibration.windows[:2], statistics_windows=2)
    found = CalibratedModel(llama, few)
    tokens = 2 * 31 + 2
    plan = Clusters(0.3, assign="oracle", sets=tokens, tokens=tokens, restarts=1).plan_for(found)
    best = Oracle(0.3, scaled=True).plan_for(found)
    mask = plan.neurons[Site(0, NEURONS)]
    assert (mask.tensors["codebook"].sum(1) == best.neurons[Site(0, NEURONS)].kept).all()
    dense = seen(llama, few.windows)
    z = F.silu(dense[0, "gate"]) * dense[0, "up"]
    weights = token_weights(z, norms(llama, 0), relative=True)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(z)))
    book = mask.tensors["codebook"].bool()
    own = largest_sets((z * norms(llama, 0)).square(), best.neurons[Site(0, NEURONS)].kept)
    held = torch.arange(len(z)) % 8 == 7  # tokens that were not clustered
    assert torch.equal(book[assigned(weights, book)][~held], own[~held])
    figures = plan.info["clusters"]
    assert 0 < figures["chance"] < figures["coverage"] <= 1
    heads = Clusters(0.3, sets=4, tokens=tokens, restarts=1).plan_for(found)
    assert {"coverage predicted", "kept weight predicted"} <= heads.info["clusters"].keys()
    kept = int(heads.neurons[Site(0, NEURONS)].tensors["codebook"].sum(1)[0])
    extra = 4 * (HIDDEN + 1) + WIDTH / 16
    unread = BLOCKS * ((WIDTH - kept) / WIDTH * MLP - extra) / whole(llama)
    assert sparse(heads, llama, ids)[1] == pytest.approx(unread, abs=1e-9)


def test_a_head_finds_sets_that_lie_in_the_input(llama):
    """Two kinds of inputs that need two sets of neurons: the head tells them apart."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 2, (200,), generator=generator)
    x = torch.randn(200, HIDDEN, generator=generator) * 0.3 + torch.where(kind[:, None] == 1, 1.0, -1.0)
    z = torch.rand(200, WIDTH, generator=generator) * 0.1
    z[kind == 0, :24] += 1.0
    z[kind == 1, 24:] += 1.0
    weights = token_weights(z, torch.ones(WIDTH), True)
    book, _ = codebook(weights, 24, 2, 1, generator)
    head, bias = linear_head(x, shares(weights, book), 0.1)
    predicted = (x @ head.float().T + bias.float()).argmax(1)
    assert torch.equal(predicted, assigned(weights, book))


def test_a_proxy_of_all_bits_and_inputs_is_the_oracle_and_bytes_follow_the_formula(llama, ids, calibration):
    found = CalibratedModel(llama, calibration)
    kept = 20
    base = fingerprint.of_model(llama)

    def plan(mask):
        return Plan({}, "x", 0.3, 0.3, base, neurons={Site(b, NEURONS): mask for b in range(BLOCKS)})

    best = sparse(plan(NeuronMask("product", kept=kept)), llama, ids)
    same = sparse(plan(NeuronMask("proxy", kept=kept, options={"bits": 16, "rests": 0.0})), llama, ids)
    assert torch.equal(same[0], best[0])
    for bits, rests in ((16, 0.0), (2, 0.5), (4, 0.25), (1, 0.0)):
        mask = NeuronMask("proxy", kept=kept, options={"bits": bits, "rests": rests})
        codes = 2 * round(HIDDEN * (1 - rests)) * WIDTH * bits / 16
        scales = 0 if bits == 16 else 2 * WIDTH  # one group of 128 holds a row
        unread = BLOCKS * ((WIDTH - kept) / WIDTH * MLP - codes - scales) / whole(llama)
        assert sparse(plan(mask), llama, ids)[1] == pytest.approx(unread, abs=1e-9)
    fitted = Proxy(0.3).plan_for(found)
    assert found.measure(fitted) == pytest.approx(0.3, abs=0.01)


def test_recall_of_the_oracle_s_set_rises_with_the_bits(llama, ids):
    x = seen(llama, ids)[1, "x"]
    mlp = llama.model.layers[1].mlp
    with torch.no_grad():
        z = (F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).abs()
        own = largest_sets(z, 20)
        recalls = []
        for bits in (1, 2, 3, 4, 6, 8, 16):
            gate, up = (rounded(layer.weight, bits) for layer in (mlp.gate_proj, mlp.up_proj))
            found = largest_sets((F.silu(x @ gate.T) * (x @ up.T)).abs(), 20)
            recalls.append(float((found & own).sum() / own.sum()))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.85 < 0.95 < recalls[5]
    assert recalls[-1] == 1.0


def test_rounding_takes_the_nearest_level():
    weight = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 4):
        found = rounded(weight, bits)
        for start in (0, 128, 256):
            part, near = weight[:, start : start + 128], found[:, start : start + 128]
            step = part.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
            levels = (torch.arange(2**bits) - 2 ** (bits - 1) + 0.5) * step[..., None]
            nearest = torch.stack([row[(p[:, None] - row).abs().argmin(1)] for p, row in zip(part, levels[:, 0])])
            assert ((near - part).abs() <= (nearest - part).abs() + 5e-3 * step).all()  # scales have 16 bits
            assert all(len(row.unique()) <= 2**bits for row in near)


CEILINGS = {
    "countdown-m": (CountdownM, 2 / 3 * MLP),
    "oracle": (Oracle, MLP),
    "griffin": (Griffin, MLP),
    "proxy": (Proxy, MLP - 2 * 16 * WIDTH * 2 / 16 - 2 * WIDTH),
    "clusters": (lambda target: Clusters(target, sets=4), MLP - 4 * (HIDDEN + 1) - WIDTH / 16),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_targets_beyond_the_mlp_are_refused(name, llama, calibration):
    method, most = CEILINGS[name]
    ceiling = most * BLOCKS / whole(llama)
    half = Calibration(calibration.windows, statistics_windows=16, tokens=LastFraction(0.5))
    with pytest.raises(TargetUnreachableError, match=f"above this method's ceiling of {ceiling:.3f}"):
        method(round(ceiling + 0.01, 3)).fit(llama, half)


@pytest.mark.parametrize("family", ["phi3", "qwen2", "gemma"])
def test_fused_and_biased_mlps_are_fitted(family, ids, calibration):
    model = decoder_of(family)
    sites = Decoder.of(model).neuron_sites()
    before = logits(model, ids)
    for method in (CountdownM(0.25, scaled=True), Clusters(0.25, sets=2, tokens=64, restarts=1)):
        plan = method.fit(model, calibration)
        assert list(plan.neurons) == sites
        assert sparse(plan, model, calibration.windows[:8])[1] == pytest.approx(0.25, abs=0.015)
    assert torch.equal(logits(model, ids), before)


def test_biases_are_trained_over_neuron_masks_or_refused(llama, ids, calibration):
    plan = Spontaneous(CountdownM(0.25), steps=2, batch=2, window=16, warmup=1, match_every=1).fit(llama, calibration)
    assert len(plan.neurons) == BLOCKS
    assert any(rule.bias is not None and bool(rule.bias.any()) for rule in plan.rules.values())
    assert sparse(plan, llama, calibration.windows[:8])[1] == pytest.approx(0.25, abs=0.015)
    refined = Spontaneous(CountdownM(0.25), thresholds="site", steps=2, batch=2, window=16)
    with pytest.raises(SparsifierError, match=r"trained at linear layers; .* masks neurons"):
        refined.fit(llama, calibration)
    with pytest.raises(SparsifierError, match="masks no input of down: nothing is dropped there"):
        MeanError(CountdownM(0.25)).fit(llama, calibration)


BAD = {
    "prior must be in": lambda: Griffin(0.3, prior=1.5),
    "bits must be in 1 to 16, got 0": lambda: Proxy(0.3, bits=0),
    "rests must be in": lambda: Proxy(0.3, rests=1.0),
    "assign must be head, oracle or prompt": lambda: Clusters(0.3, assign="all"),
    "sets must be at least 1": lambda: Clusters(0.3, sets=0),
    "importance must be relative or variance": lambda: Static(0.3, importance="all"),
}


@pytest.mark.parametrize("said", BAD)
def test_parameters_that_are_none_are_refused(said):
    with pytest.raises(SparsifierError, match=said):
        BAD[said]()
