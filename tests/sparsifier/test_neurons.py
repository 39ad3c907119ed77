"""Neuron masks: what rests plays no part, prompts keep their state, bytes are those of the formula, files hold all."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from decoders import decoder_of
from decoders import run as logits
from torch.nn import functional as F

from resting.sparsifier import (
    ACT,
    NEURONS,
    AllButFirst,
    DecodeOnly,
    Decoder,
    LastFraction,
    Meter,
    NeuronMask,
    Plan,
    PlanError,
    Rule,
    Score,
    Site,
    SparsifierError,
    UnsupportedModelError,
    fingerprint,
    register_score,
)
from resting.sparsifier.neurons.mask import SCORES

IDS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
WIDTH, HIDDEN = 48, 32
HALF = (torch.arange(WIDTH) % 2).to(torch.uint8)
KEEPS_ALL = {
    "up": NeuronMask("up", 0.0),
    "product": NeuronMask("product", kept=WIDTH),
    "fixed": NeuronMask("fixed", tensors={"keep": torch.ones(WIDTH, dtype=torch.uint8)}),
    "prompt": NeuronMask("prompt", kept=WIDTH),
    "proxy": NeuronMask("proxy", kept=WIDTH, options={"bits": 4, "rests": 0.5}),
    "clusters": NeuronMask("clusters", tensors={"codebook": torch.ones(2, WIDTH, dtype=torch.uint8)}),
}


def plan_of(model, mask, rules=None):
    sites = Decoder.of(model).neuron_sites()
    return Plan(rules or {}, "x", 0.5, 0.5, fingerprint.of_model(model), neurons=dict.fromkeys(sites, mask))


def sparse(model, mask, ids=IDS, tokens=None, rules=None, **more):
    meter = Meter()
    with torch.no_grad(), plan_of(model, mask, rules).applied(model, tokens or DecodeOnly(6), meter):
        return model(input_ids=ids, **more).logits, meter.byte_sparsity()


def by_hand(model, ids, keep, dense):
    """Logits where z of all tokens after the first `dense` is multiplied with ``keep(x, gate, up, z)``, all of them."""
    with ExitStack() as stack:
        for layer in model.model.layers:
            seen = {}
            mlp = layer.mlp
            hooks = [("gate_proj", lambda m, a, y, s=seen: s.update(x=a[0], g=y))]
            hooks += [("up_proj", lambda m, a, y, s=seen: s.update(u=y))]
            if hasattr(mlp, "gate_up_proj"):
                both = lambda m, a, y, s=seen: s.update(x=a[0], g=y[..., :WIDTH], u=y[..., WIDTH:])  # noqa: E731
                hooks = [("gate_up_proj", both)]
            for name, hook in hooks:
                stack.callback(getattr(mlp, name).register_forward_hook(hook).remove)

            def mask(module, args, s=seen):
                z = args[0]
                kept = z * keep(s["x"], s["g"], s["u"], z)
                return (torch.cat([z[:, :dense], kept[:, dense:]], 1),)

            stack.callback(mlp.down_proj.register_forward_pre_hook(mask).remove)
        with torch.no_grad():
            return model(ids).logits


def top(score, count):
    return torch.zeros_like(score).scatter_(-1, score.topk(count, -1).indices, 1.0)


def griffin(z, prompt=6, count=20):
    z = z[:, :prompt]
    s = torch.linalg.vector_norm(z / torch.linalg.vector_norm(z, dim=-1, keepdim=True), dim=1)
    return top(s, count)[:, None]


@pytest.mark.parametrize("name", KEEPS_ALL)
def test_where_all_is_kept_or_all_is_prompt_the_model_is_dense(name, llama):
    dense = logits(llama, IDS)
    assert torch.equal(sparse(llama, KEEPS_ALL[name])[0], dense)
    with plan_of(llama, NeuronMask("prompt", kept=5)).applied(llama, DecodeOnly(40)):
        assert torch.equal(logits(llama, IDS), dense)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_masks_equal_their_formulas(family):
    model = decoder_of(family)
    act = F.silu if family != "gemma3_text" else lambda t: F.gelu(t, approximate="tanh")
    scale = torch.linspace(0.2, 2.0, WIDTH)
    cases = [
        (NeuronMask("up", 0.3), lambda x, g, u, z: (u.abs() > 0.3).float()),
        (NeuronMask("up", 0.3, scale=scale), lambda x, g, u, z: (u.abs() * scale > 0.3).float()),
        (NeuronMask("product", kept=20), lambda x, g, u, z: top((act(g) * u).abs(), 20)),
        (NeuronMask("fixed", tensors={"keep": HALF}), lambda x, g, u, z: HALF.float()),
        (NeuronMask("prompt", kept=20), lambda x, g, u, z: griffin(z)),
    ]
    for mask, keep in cases:
        out, unread = sparse(model, mask)
        torch.testing.assert_close(out, by_hand(model, IDS, keep, dense=6), rtol=1e-5, atol=1e-5)
        assert not torch.equal(out, logits(model, IDS))
        if mask.threshold is None:  # exactly so many rows of gate and up and columns of down
            total = sum(p.numel() for n, p in model.named_parameters() if "proj" in n and p.dim() == 2)
            rested = WIDTH - int(HALF.sum()) if mask.score == "fixed" else WIDTH - 20
            assert unread == pytest.approx(rested * 3 * HIDDEN * 3 / total)


GATED = ["llama", "qwen2", "gemma2", "olmo2", "granite", "cohere", "exaone4", "stablelm", "diffllama", "minicpm3"]
GATED += ["phi3", "glm4", "falcon_h1", "recurrent_gemma", "olmo_hybrid"]
REFUSED = {
    "bitnet": "ffn_sub_norm beside gate, up and down",
    "gemma3n_text": "cut by a quantile over all its neurons",
    "gpt2": "no MLP of GPT2Model has a gate",
    "opt": "no MLP of OPTDecoder has a gate",
    "lfm2": "no MLP of Lfm2Model has a gate whose activation is a module",
    "qwen3_moe": "block 0 holds experts",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_without_such_neurons_are_refused(family):
    model = decoder_of(family)
    masks = {Site(0, NEURONS): NeuronMask("product", kept=20)}
    plan = Plan({}, "x", 0.5, 0.5, fingerprint.of_model(model), neurons=masks)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]), plan.applied(model):
        pass


@pytest.mark.parametrize("family", GATED)
def test_of_a_resting_neuron_no_weight_plays_a_part(family):
    """The bytes that are counted as unread could hold anything."""
    model = decoder_of(family)
    sites = (decoder := Decoder.of(model)).neuron_sites()
    masks = {}
    for site in sites:
        width = decoder.mlp_shape(site)[1]
        masks[site] = NeuronMask("fixed", tensors={"keep": torch.arange(width) % 2})
    before = Plan({}, "x", 0.5, 0.5, fingerprint.of_model(model), neurons=masks)
    with before.applied(model, AllButFirst(0)):
        expected = logits(model, IDS)
    with torch.no_grad():
        for site in sites:
            (gate, up), biases = decoder.gate_and_up(site)
            for rows in (gate, up, *(bias for bias in biases if bias is not None)):
                rows[::2] += 7.0
            decoder.projection(site._replace(role="down")).weight[:, ::2] += 7.0
    after = Plan({}, "x", 0.5, 0.5, fingerprint.of_model(model), neurons=masks)
    with after.applied(model, AllButFirst(0)):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-5, atol=1e-5)


def stepwise(model, mask, ids, pieces, tokens):
    """Logits of a sequence that comes in `pieces`, through a cache."""
    out, found, at = None, [], 0
    with torch.no_grad(), plan_of(model, mask).applied(model, tokens):
        for length in pieces:
            past = {} if out is None else {"past_key_values": out.past_key_values}
            out = model(ids[:, at : at + length], use_cache=True, **past)
            found.append(out.logits)
            at += length
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "mask",
    [NeuronMask("prompt", kept=20), NeuronMask("clusters-prompt", tensors={"codebook": torch.stack([HALF, 1 - HALF])})],
)
def test_the_prompt_decides_for_its_own_sequence_alone(mask, llama):
    whole = sparse(llama, mask)[0]
    alone = torch.cat([sparse(llama, mask, row[None])[0] for row in IDS])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[:, 6:], logits(llama, IDS)[:, 6:], atol=1e-3)
    for pieces, tokens in (((6, *[1] * 10), DecodeOnly()), ((6, 10), DecodeOnly()), ((3, 5, 8), DecodeOnly(6))):
        torch.testing.assert_close(stepwise(llama, mask, IDS, pieces, tokens), whole, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), plan_of(llama, mask).applied(llama, DecodeOnly(6)):  # one after another
        for row, expected in zip(IDS, alone):
            torch.testing.assert_close(llama(row[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    real = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    real[1, 3] = 0  # rows of unlike length: the second prompt begins a token later
    out = sparse(llama, mask, padded, attention_mask=real)[0][:, 3:]
    torch.testing.assert_close(out[0], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[1, 1:], sparse(llama, mask, IDS[1:, 1:])[0][0], rtol=1e-4, atol=1e-4)


def test_what_is_no_sequence_of_a_prompt_is_refused(llama):
    mask = NeuronMask("prompt", kept=20)
    for tokens in (AllButFirst(1), DecodeOnly(0), LastFraction(1.0)):
        with pytest.raises(SparsifierError, match=f"token policy {tokens} leaves none; allowed: decode-only"):
            sparse(llama, mask, tokens=tokens)
    positions = torch.cat([torch.arange(8), torch.arange(8)])[None]
    with pytest.raises(SparsifierError, match="packed into one row share no prompt"):
        sparse(llama, mask, IDS[:1], DecodeOnly(4), position_ids=positions, use_cache=False)
    with torch.no_grad(), plan_of(llama, mask).applied(llama, DecodeOnly()):
        first = llama(IDS, use_cache=True).past_key_values
        first.batch_repeat_interleave(2)
        with pytest.raises(SparsifierError, match="prompts of 2 sequences, and the batch has 4"):
            llama(IDS[:, :1].repeat(2, 1), past_key_values=first)
        first, second = (llama(IDS, use_cache=True).past_key_values for _ in range(2))
        llama(IDS[:, :1], past_key_values=second)
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            llama(IDS[:, :1], past_key_values=first)
    with torch.no_grad():
        outside = llama(IDS, use_cache=True).past_key_values
        with plan_of(llama, mask).applied(llama, DecodeOnly()), pytest.raises(SparsifierError, match="holds 16 tokens"):
            llama(IDS[:, :1], past_key_values=outside)


@pytest.mark.parametrize("mask", [NeuronMask("up", 0.2), NeuronMask("product", kept=20)])
def test_rows_and_columns_count_together(mask, llama):
    """Of a kept row the kept columns are read; a rule at down counts its own zeros and the mask's."""
    rules = {Site(1, role): Rule(threshold=0.4) for role in ("gate", "up", "down")}
    shares = []

    def keep(x, g, u, z):
        kept = (u.abs() > 0.2).float() if mask.kept is None else top(z.abs(), 20)
        columns = (x.abs() > 0.4)[:, 6:].double().mean(-1)
        rows, zeros = kept[:, 6:].double().mean(-1), ((z * kept).abs() > 0.4)[:, 6:].double().mean(-1)
        shares.append((columns * rows, columns * (1.0 if mask.kept is None else rows), zeros, rows))
        return kept

    alone = plan_of(llama, mask)
    plan = Plan(rules, "x", 0.5, 0.5, alone.model, neurons={Site(1, NEURONS): mask})
    meter = Meter()
    with torch.no_grad(), plan.applied(llama, DecodeOnly(6), meter):
        llama(IDS)
    with ExitStack() as stack:  # the masked inputs of block 1, as the rules make them
        mlp = llama.model.layers[1].mlp
        seen = {}
        stack.callback(mlp.gate_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])).remove)
        logits(llama, IDS)
        x = seen["x"]
    masked = torch.cat([x[:, :6], (x * (x.abs() > 0.4))[:, 6:]], 1)
    g, u = F.linear(masked, mlp.gate_proj.weight), F.linear(masked, mlp.up_proj.weight)
    keep(x, g, u, F.silu(g) * u)
    found = meter.site_sparsity()
    for role, read in zip(("gate", "up", "down"), shares[0]):
        assert found[Site(1, role)] == pytest.approx(1.0 - float(read.mean()), abs=1e-9)


def test_files_hold_all_of_a_mask(llama, tmp_path):
    masks = [
        NeuronMask("up", 0.25, scale=torch.linspace(0.5, 1.0, WIDTH)),
        NeuronMask("prompt", kept=20, tensors={"prior": torch.rand(WIDTH)}, options={"lambda": 0.5}),
        NeuronMask("proxy", kept=20, options={"bits": 2, "rests": 0.5}),
    ]
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    for number, mask in enumerate(masks):
        plan = plan_of(llama, mask, {Site(0, "q"): Rule(threshold=0.1)})
        assert plan.is_plain
        plan.save(tmp_path / f"{number}")
        loaded = Plan.load(tmp_path / f"{number}")
        with plan.applied(llama, DecodeOnly(6)):
            expected = logits(llama, IDS)
        with loaded.applied(llama, DecodeOnly(6)):
            assert torch.equal(logits(llama, IDS), expected)
            assert llama.state_dict().keys() == before.keys()
            with pytest.raises(PlanError, match="applied to this model already"), loaded.applied(llama, DecodeOnly(6)):
                pass
        assert loaded.neurons[Site(0, NEURONS)].options == mask.options
        assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
        assert not plan.biases_only().neurons


def test_a_plug_in_registers_a_score(llama):
    score = Score(lambda mask, seen: -seen.x[..., :1] * torch.arange(WIDTH), sees=frozenset({"x"}))
    register_score("first by x", score)
    try:
        out, _ = sparse(llama, NeuronMask("first by x", kept=10))
        expected = by_hand(llama, IDS, lambda x, g, u, z: top(-x[..., :1] * torch.arange(WIDTH), 10), dense=6)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(SparsifierError, match="'first by x' is registered already"):
            register_score("first by x", Score(lambda mask, seen: seen.z))
    finally:
        del SCORES["first by x"]
    with pytest.raises(PlanError, match=r"no registered score; allowed: up, product"):
        NeuronMask("first by x", kept=10)


BAD = {
    "takes one of threshold and kept, got none": lambda: NeuronMask("up"),
    "takes one of threshold and kept, got threshold, kept": lambda: NeuronMask("up", 0.1, kept=3),
    "takes neither threshold nor kept, got kept": lambda: NeuronMask("fixed", kept=3, tensors={"keep": HALF}),
    "threshold of a neuron mask must be a number of at least 0, got nan": lambda: NeuronMask("up", float("nan")),
    "kept must be a whole number of at least 0, got -1": lambda: NeuronMask("product", kept=-1),
    "takes no scale": lambda: NeuronMask("fixed", scale=torch.ones(WIDTH), tensors={"keep": HALF}),
    "finite numbers of at least 0": lambda: NeuronMask("up", 0.1, scale=-torch.ones(WIDTH)),
    "prior and the option lambda together": lambda: NeuronMask("prompt", kept=3, options={"lambda": 0.5}),
    "1 to 16 bits, got 17": lambda: NeuronMask("proxy", kept=3, options={"bits": 17, "rests": 0.5}),
    "a codebook is": lambda: NeuronMask("clusters", tensors={"codebook": torch.full((2, WIDTH), 3)}),
}
MISFITS = {
    "kept at .* is 60, and the MLP has 48": NeuronMask("product", kept=60),
    "scale at .* has 3 entries": NeuronMask("up", 0.1, scale=torch.ones(3)),
    "lacks the tensor 'keep'": NeuronMask("fixed"),
    "has no use for the tensor 'more'": NeuronMask("up", 0.1, tensors={"more": HALF}),
    r"keep at .* is \[3\], the model needs \[48\]": NeuronMask("fixed", tensors={"keep": torch.ones(3)}),
    "its predictor is wider than its site": NeuronMask(
        "clusters-head",
        tensors={
            "codebook": HALF.expand(200, -1),
            "head": torch.zeros(200, HIDDEN),
            "head_bias": torch.zeros(200),
        },
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_mask_is_refused(said):
    with pytest.raises(PlanError, match=said):
        BAD[said]()


@pytest.mark.parametrize("said", MISFITS)
def test_what_does_not_fit_is_refused(said, llama):
    with pytest.raises(PlanError, match=said):
        sparse(llama, MISFITS[said])


def test_places_without_neurons_are_refused(llama):
    mask = NeuronMask("product", kept=20)
    for site, rules in ((Site(0, "down"), {}), (Site(7, NEURONS), {}), (Site(0, NEURONS), {Site(0, ACT): Rule(0.1)})):
        plan = Plan(rules, "x", 0.5, 0.5, fingerprint.of_model(llama), neurons={site: mask})
        with pytest.raises(PlanError, match=r"no gated MLP|not both"), plan.applied(llama):
            pass


def test_two_sequences_without_a_cache_at_first_are_told_apart(llama):
    """Both prompts have one length, and only the caches that their forwards made tell them apart."""
    with torch.no_grad(), plan_of(llama, NeuronMask("prompt", kept=20)).applied(llama, DecodeOnly()):
        first, second = (llama(IDS[i : i + 1], use_cache=True).past_key_values for i in range(2))
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            llama(IDS[:1, :1], past_key_values=first)
        llama(IDS[:1, :1], past_key_values=second)


def test_beams_share_their_prompt_or_are_refused(llama):
    """Beam search exchanges rows of the cache, and not what a mask knows of them."""
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    plan = plan_of(llama, NeuronMask("prompt", kept=20))
    with torch.no_grad():
        with plan.applied(llama, DecodeOnly()):
            found = llama.generate(IDS[:1], **settings)
        with plan.applied(llama, DecodeOnly(16)):
            for row, score in zip(found.sequences, found.sequences_scores):
                nll = llama(row[None]).logits[0].log_softmax(-1)
                of_new = nll[15:-1].gather(1, row[16:, None]).mean()
                torch.testing.assert_close(of_new, score, rtol=1e-4, atol=1e-4)
        with plan.applied(llama, DecodeOnly(18)), pytest.raises(SparsifierError, match="rows beam search exchanges"):
            llama.generate(IDS[:1], **settings)
