"""Streaming statistics against numpy and direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.baselines.teal import Teal
from resting.sparsifier import (
    Calibration,
    ChannelMoments,
    Decoder,
    DivergedError,
    Histogram,
    Site,
    SparsifierError,
    Statistic,
    Statistics,
)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), ratio=st.floats(0.01, 0.99), scale=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]))
def test_quantiles(seed, ratio, scale):
    x = scale * torch.randn(20000, generator=torch.Generator().manual_seed(seed))
    histogram = Histogram()
    for part in x.split(7000):
        histogram.add(part)
    threshold = histogram.quantile(ratio)
    low, high = np.quantile(x.abs().numpy(), [ratio - 1e-4, ratio + 1e-4])
    assert low * (1 - 0.004) <= threshold <= high * (1 + 0.004)
    assert float((x.abs() <= threshold).float().mean()) == pytest.approx(ratio, abs=0.003)


def test_extremes():
    histogram = Histogram()
    with pytest.raises(SparsifierError, match="empty"):
        histogram.quantile(0.5)
    histogram.add(torch.tensor([0.0, 1e-30, 1.0, 1e30]))
    assert histogram.quantile(0.0) == 0.0
    assert histogram.quantile(1.0) >= 1e9
    with pytest.raises(SparsifierError, match=r"\[0, 1\], got 1.5"):
        histogram.quantile(1.5)
    with pytest.raises(DivergedError):
        histogram.add(torch.tensor([1.0, float("inf")]))


def test_statistics_are_those_of_the_sites_inputs(llama, calibration):
    statistics = Statistics.collect(llama, calibration)
    seen = []
    handle = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:]))
    with torch.no_grad():
        llama(calibration.windows[:16])
    handle.remove()
    expected = Histogram()
    expected.add(torch.cat(seen))
    counts = statistics[Site(1, "down")].histogram.counts
    assert int(counts.sum()) == 16 * 31 * 48
    # Another batch size may round an activation into the next bin.
    assert int((counts - expected.counts).abs().sum()) <= 4
    assert statistics[Site(1, "q")] is statistics[Site(1, "v")]


def test_padding_enters_no_statistic(llama):
    windows = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(windows)
    mask[:, 10:] = 0
    padded = Statistics.collect(llama, Calibration(windows, attention_mask=mask))
    cut = Statistics.collect(llama, Calibration(windows[:, :10]))
    for site in Decoder.of(llama).sites():
        assert int(padded[site].histogram.counts.sum()) == int(cut[site].histogram.counts.sum())


def test_non_finite_activations_name_the_site(llama, calibration):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"at site 1\.down of the dense model"):
        Teal(target=0.5).fit(llama, calibration)


def test_an_activation_that_serves_all_blocks_is_seen_at_each(llama, calibration):
    own = Statistics.collect(llama, calibration)
    for layer in llama.model.layers:
        layer.mlp.act_fn = llama.model.layers[0].mlp.act_fn
    shared = Statistics.collect(llama, calibration)
    for block in range(3):
        assert torch.equal(shared[Site(block, "act")].histogram.counts, own[Site(block, "act")].histogram.counts)


def test_moments_of_channels_have_their_signs(llama, calibration):
    statistics = Statistics.collect(llama, calibration, {Statistic.MOMENTS})
    seen = []
    down = llama.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:].flatten(0, 1)))
    with torch.no_grad():
        llama(calibration.windows[: calibration.statistics_windows])
    hook.remove()
    x = torch.cat(seen).double()
    found = statistics[Site(1, "down")].moments()
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.variance, x.var(0, correction=0), rtol=1e-5, atol=1e-10)
    with pytest.raises(SparsifierError, match=r"add Statistic\.MOMENTS"):
        Statistics.collect(llama, calibration)[Site(1, "down")].moments()


def test_a_channel_far_from_zero_keeps_its_variance():
    random = torch.Generator().manual_seed(0)
    x = 1e6 + torch.randn(1000, 3, generator=random, dtype=torch.float64)
    parts = [ChannelMoments(), ChannelMoments()]
    for moments, part in zip(parts, x.split(700)):
        for some in part.split(130):
            moments.add(some)
    together = ChannelMoments.together([ChannelMoments(), *parts])
    torch.testing.assert_close(together.variance, x.var(0, correction=0), rtol=1e-8, atol=0)
    with pytest.raises(SparsifierError, match="no token"):
        ChannelMoments().mean  # noqa: B018
    with pytest.raises(DivergedError):
        parts[0].add(torch.tensor([[float("nan")] * 3]))
