"""What the authors' own code does where it differs from the paper, or from what is common here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import oracle
import pytest
import torch

from resting.baselines.rsparse import RSparse
from resting.baselines.wina import Wina
from resting.sparsifier import (
    LINEAR_ROLES,
    CalibratedModel,
    LastFraction,
    Meter,
    Site,
    SparsifierError,
)


@pytest.mark.parametrize("length", [*range(1, 130), 512, 2048, 2559, 2560])
def test_rsparse_keeps_dense_what_its_authors_code_does(length):
    """Their first ``int(.9 n)`` tokens, so that a sequence of any length has a sparse one."""
    policy = RSparse.original.tokens
    assert policy.dense_tokens(length, 0) == math.floor(9 * length / 10)
    assert policy.dense_tokens(length, 5) == 0  # decoded
    assert str(policy) != str(LastFraction(0.1))


def test_rsparse_makes_those_tokens_sparse_in_the_model(llama, ids, calibration):
    plan, length = RSparse(0.5, protocol="original").fit(llama, calibration), 7
    meter, seen = Meter(), {}
    with plan.applied(llama, RSparse.original.tokens, meter), torch.no_grad(), ExitStack() as stack:
        for name, module in llama.named_modules():
            if name.endswith("down_proj.linear"):
                hook = module.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
                stack.callback(hook.remove)
        llama(ids[:, :length])
    assert meter.byte_sparsity() > 0.1
    for x in seen.values():
        assert (x == 0).any(-1)[0].tolist() == [False] * 6 + [True]  # int(.9 * 7) = 6 are dense


@contextmanager
def scored(model, norms: tuple[str, ...]) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """By block and role, |x_i| ||W_:i|| of the dense model in float64, without the norms where a role has none."""
    seen = {}

    def keep(module, args, key):
        score = args[0].double().abs() * (module.weight.double().norm(dim=0) if key[1] in norms else 1.0)
        seen[key] = torch.cat([seen.get(key, score[:0, 1:].flatten()), score[:, 1:].flatten()])

    with ExitStack() as stack:
        for key, module in oracle.linears(model).items():
            stack.callback(module.register_forward_pre_hook(lambda m, a, key=key: keep(m, a, key)).remove)
        yield seen


def test_wina_as_released_has_norms_at_k_and_gate_alone(llama, ids, calibration):
    plan = Wina(norms=("k", "gate")).plan_at(CalibratedModel(llama, calibration), 0.5)
    assert plan.method == "wina-released"
    with scored(llama, ("k", "gate")) as scores, torch.no_grad():
        llama(calibration.windows[: calibration.statistics_windows])
    linears = oracle.linears(llama)
    for (block, role), all_scores in scores.items():
        rule = plan.rules[Site(block, role)]
        # Half of all scores rest; a bin of the histogram is a 256th of a power of two wide.
        assert rule.threshold == pytest.approx(float(all_scores.median()), rel=0.01)
        if role in ("k", "gate"):
            torch.testing.assert_close(rule.scale, linears[block, role].weight.norm(dim=0))
        else:
            assert rule.scale == 1.0

    def masked(key, x):
        norms = linears[key].weight.norm(dim=0) if key[1] in ("k", "gate") else 1.0
        kept = x * (x.abs() * norms > plan.rules[Site(*key)].threshold)
        return torch.cat([x[:, :1], kept[:, 1:]], 1)

    with plan.applied(llama), torch.no_grad():
        actual = llama(ids).logits
    torch.testing.assert_close(actual, oracle.hooked(llama, ids, masked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norms", "allocation", "label"),
    [
        (LINEAR_ROLES, "uniform", "wina"),
        (LINEAR_ROLES, "greedy", "wina-greedy"),
        (("k", "gate"), "uniform", "wina-released"),
        (("k", "gate"), "greedy", "wina-released-greedy"),
    ],
)
def test_the_two_scores_of_wina_are_told_apart(norms, allocation, label):
    assert Wina(norms=norms, allocation=allocation).label == label


def test_a_role_without_a_score_is_named():
    with pytest.raises(SparsifierError, match="norms must be some of q, k, v, o, gate, up, down, got act"):
        Wina(norms=("k", "act"))


def test_greedy_paths_of_two_scores_are_not_shared(llama, calibration, tmp_path):
    """What a rule depends on names the paths: wina's would be taken for those of wina-released."""

    def ratios(norms, folder):
        shared = CalibratedModel(llama, calibration, folder=folder)
        return Wina(0.5, "greedy", step=0.03, window=16, norms=norms).ratios(shared, 0.4)

    own = {norms: ratios(norms, None) for norms in (LINEAR_ROLES, ("k", "gate"))}
    assert own[LINEAR_ROLES] != own["k", "gate"]
    for norms, expected in own.items():
        assert ratios(norms, tmp_path) == expected
