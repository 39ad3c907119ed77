"""Evolutionary search, alone and in R-Sparse."""

from __future__ import annotations

import math
from itertools import pairwise

import oracle
import pytest
import torch
from torch.nn import functional as F

from resting.baselines import rsparse
from resting.baselines.rsparse import RSparse
from resting.sparsifier import CalibratedModel, Site, SparsifierError
from resting.sparsifier.allocation import Evolution

BEST = [0.1, 0.8, 0.35, 0.6, 0.95, 0.5]
FOUNDERS = [[0.5] * 6, [1.0] * 6]
GROUPS = [[0, 1, 2], [3, 4, 5]]
SMALL = Evolution(population=8, generations=4, mutation=0.3, seed=0)


def distance(genome):
    return sum((a - b) ** 2 for a, b in zip(genome, BEST))


class Interrupted(Exception):
    pass


class Counted:
    """A fitness that remembers what it was asked, and stops after so many questions."""

    def __init__(self, stop=math.inf, loss=distance):
        self.seen, self.stop, self.loss = [], stop, loss

    def __call__(self, genome):
        if len(self.seen) >= self.stop:
            raise Interrupted
        self.seen.append(list(genome))
        return self.loss(genome)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_never_gets_worse(seed):
    asked = Counted()
    genome, losses = Evolution(8, 6, 0.2, seed).search(FOUNDERS, GROUPS, asked)
    assert len(losses) == 2 * 6
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] == distance(genome) == min(map(distance, asked.seen))
    assert losses[-1] < losses[0] <= distance(FOUNDERS[0])
    assert losses[-1] < 0.7 * distance(FOUNDERS[0])


def test_the_loss_of_a_generation_is_the_least_seen_so_far():
    asked, told = Counted(), []
    SMALL.search(FOUNDERS, GROUPS, asked, on_progress=lambda *a: told.append((*a, min(map(distance, asked.seen)))))
    assert [told_of for *told_of, _, _ in told] == [["evolution", i, 8] for i in range(1, 9)]
    assert [note for *_, note, _ in told] == [f"loss {least:.4f}" for *_, least in told]


def test_it_is_seeded():
    a, b, c = (Evolution(8, 4, 0.3, seed).search(FOUNDERS, GROUPS, distance) for seed in (3, 3, 4))
    assert a == b
    assert a[0] != c[0]


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_genes_stay_in_0_to_1(edge):
    """Half of the steps from an edge lead out of the interval."""
    asked = Counted(loss=lambda genome: sum(abs(gene - edge) for gene in genome))
    Evolution(24, 4, 1.0).search([[edge] * 6, [0.5] * 6], GROUPS, asked)
    genes = [gene for genome in asked.seen for gene in genome]
    assert all(0.0 <= gene <= 1.0 for gene in genes)
    assert any(0.0 < abs(gene - edge) < 0.2 for gene in genes)
    assert any(0 < sum(gene == edge for gene in genome[:3]) < 3 for genome in asked.seen)


def test_only_the_genes_of_a_group_vary():
    asked = Counted()
    half = []
    SMALL.search(FOUNDERS, GROUPS, asked, on_progress=lambda *a: half.append(len(asked.seen)) if a[1] == 4 else None)
    first, second = asked.seen[: half[0]], asked.seen[half[0] :]
    best = min(first, key=distance)
    assert all(genome[3:] == FOUNDERS[0][3:] for genome in first)
    assert all(genome[:3] == best[:3] for genome in second)
    assert len({tuple(genome[3:]) for genome in second}) > 8


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_best_founder_is_found(position):
    founders = [[0.5] * 6, [1.0] * 6]
    founders.insert(position, BEST)
    genome, losses = SMALL.search(founders, GROUPS, distance)
    assert genome == BEST
    assert losses[-1] == 0.0


def test_a_generation_asks_for_no_more_than_the_population():
    asked, counts = Counted(), []
    SMALL.search(FOUNDERS, GROUPS, asked, on_progress=lambda *a: counts.append(len(asked.seen)))
    assert max(b - a for a, b in zip([0, *counts], counts)) <= 8
    assert len(asked.seen) == len(set(map(tuple, asked.seen)))  # no genome twice


WHOLE = Counted()
EXPECTED = SMALL.search(FOUNDERS, GROUPS, WHOLE)


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 9, 20, 30, len(WHOLE.seen) - 1])
def test_a_killed_search_goes_on(stop, tmp_path):
    file, asked = tmp_path / "folder" / "state.json", Counted()
    with pytest.raises(Interrupted):
        SMALL.search(FOUNDERS, GROUPS, Counted(stop), file)
    assert SMALL.search(FOUNDERS, GROUPS, asked, file) == EXPECTED
    assert len(asked.seen) <= len(WHOLE.seen) - max(0, stop - 8)  # at most one generation is asked for again
    assert asked.seen == WHOLE.seen[len(WHOLE.seen) - len(asked.seen) :]


def test_killed_again_and_again(tmp_path):
    file, result, rounds = tmp_path / "state.json", None, 0
    while result is None:
        rounds += 1
        try:
            result = SMALL.search(FOUNDERS, GROUPS, Counted(9), file)
        except Interrupted:
            assert rounds < 20
    assert result == EXPECTED
    assert rounds > 3


def test_a_finished_search_is_read(tmp_path):
    file = tmp_path / "state.json"
    assert SMALL.search(FOUNDERS, GROUPS, distance, file) == EXPECTED
    assert SMALL.search(FOUNDERS, GROUPS, Counted(0), file) == EXPECTED
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("content", ["", '{"group": 1, "gener', "[]", "{}"])
def test_a_damaged_file_is_searched_again(content, tmp_path):
    file = tmp_path / "state.json"
    file.write_text(content)
    assert SMALL.search(FOUNDERS, GROUPS, distance, file) == EXPECTED
    assert SMALL.search(FOUNDERS, GROUPS, Counted(0), file) == EXPECTED


def test_a_loss_that_is_not_a_number_is_never_the_best():
    def fitness(genome):
        return math.nan if genome == FOUNDERS[0] else distance(genome)

    genome, losses = SMALL.search(FOUNDERS, GROUPS, fitness)
    assert losses[-1] == distance(genome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 1}, "population must be at least 2, got 1"),
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"mutation": 1.5}, r"mutation must be in \[0, 1\], got 1\.5"),
        ({"mutation": -0.1}, r"mutation must be in \[0, 1\], got -0\.1"),
    ],
)
def test_bad_parameters_are_named(changes, message):
    with pytest.raises(SparsifierError, match=message):
        Evolution(**changes)
    with pytest.raises(SparsifierError, match=message):
        RSparse(search=True, **changes)


def searching(target=0.4, **changes):
    sizes = {"population": 6, "generations": 2, "group": 2, "fitness_windows": 4, "mutation": 0.3}
    return RSparse(target=target, search=True, **(sizes | changes))


def test_rsparse_search(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = searching(0.3).plan_for(calibrated)
    assert plan.method == "rsparse-search"
    assert calibrated.measure(plan) == plan.info["matched"] == pytest.approx(0.3, abs=0.01)
    rho, losses = plan.info["rho"], plan.info["losses"]
    assert set(rho) == {f"{block}.{role}" for block, role in oracle.linears(llama)}
    assert all(0.0 <= value <= 1.0 for value in rho.values())
    assert len(set(rho.values())) > 2
    assert len(losses) == 2 * 2  # two groups of blocks
    assert losses == sorted(losses, reverse=True)
    again = searching(0.3).fit(llama, calibration)
    assert again.info == plan.info
    assert str(again.rules) == str(plan.rules)
    assert searching(0.3, seed=1).fit(llama, calibration).info["rho"] != rho


def test_rsparse_search_ranks_are_what_the_budget_leaves(llama, calibration):
    plan = searching(0.3).fit(llama, calibration)
    low_rank = 0
    for key, linear in oracle.linears(llama).items():
        (out, width), site = linear.weight.shape, Site(*key)
        rho, density = plan.info["rho"][str(site)], 1.0 - plan.info["ratios"][str(site)]
        if rho == 1.0:
            assert plan.rules[site].low_rank is None
            continue
        kept = int(width * density * rho)
        rank = max(1, int((out * width * density - kept * out) / (out + width)))
        u, v = plan.rules[site].low_rank
        assert (u.shape, v.shape) == ((out, rank), (rank, width))
        low_rank += 1
    assert low_rank > 5


def test_rsparse_search_is_no_worse_than_its_founders(llama, calibration):
    """By their loss on its windows, at the ratios of the uniform start."""
    calibrated = CalibratedModel(llama, calibration)
    plan = searching(rho=0.8, population=4).plan_for(calibrated)
    start = RSparse(target=0.4, rho=0.8).plan_for(calibrated)
    ids = calibration.windows[-4:]
    with torch.no_grad(), start.applied(llama):
        logits = llama(ids).logits
    loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert plan.info["losses"][0] <= loss + 1e-5
    assert plan.info["losses"][-1] < loss


def test_rsparse_search_goes_on(llama, calibration, tmp_path, monkeypatch):
    expected = searching().fit(llama, calibration)
    calls, mean_nll = [], rsparse.mean_nll

    def limited(stop):
        def call(*args):
            if len(calls) >= stop:
                raise Interrupted
            calls.append(args)
            return mean_nll(*args)

        calls.clear()
        monkeypatch.setattr(rsparse, "mean_nll", call)

    limited(9)
    with pytest.raises(Interrupted):
        searching().fit(llama, calibration, folder=tmp_path)
    limited(99)
    assert searching().fit(llama, calibration, folder=tmp_path).info == expected.info
    assert calls
    assert all(torch.equal(windows, calibration.windows[-4:]) for _, windows, _ in calls)
    limited(0)
    assert searching().fit(llama, calibration, folder=tmp_path).info == expected.info  # all read from its file
