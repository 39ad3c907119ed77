"""Which form of a product is chosen, with times that are given: nothing is measured here."""

from __future__ import annotations

import pytest
import torch

from resting.sparsifier.decoding import cuda_forms, cuda_layouts
from resting.sparsifier.decoding.cuda_forms import form_for
from resting.sparsifier.decoding.cuda_masked import Masked
from resting.sparsifier.decoding.cuda_triton import Launch

LISTED = Launch(64, 128, 2, 8)
SHAPE = cuda_layouts.Shape("columns", 4096, 4096, torch.bfloat16, torch.device("cuda", 0))


@pytest.fixture
def asked(monkeypatch):
    """Small programs take a time that grows with what rests, beside the list, which takes half a second."""
    found = []

    def timed(shape, share):
        found.append((shape, share))
        return lambda at: 0.5 if at == LISTED else share + 0.1 * cuda_forms.MASKED.index(at)

    monkeypatch.setattr(cuda_forms, "FORMS", {})
    monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
    monkeypatch.setattr(cuda_forms, "CHOSEN", cuda_layouts.CHOSEN)
    monkeypatch.setattr(cuda_forms, "chosen", lambda shape: LISTED)
    monkeypatch.setattr(cuda_forms, "remembered", lambda kind, what, device, measure: measure())
    monkeypatch.setattr(cuda_forms, "_timed", timed)
    return found


def test_the_faster_form_at_the_nearest_share_is_used(asked):
    assert form_for(SHAPE, 0.3) == cuda_forms.MASKED[0]
    assert form_for(SHAPE, 0.64) == LISTED
    assert form_for(SHAPE, 0.5) == LISTED  # as fast is not faster
    assert [share for _, share in asked] == [0.25, 0.7, 0.5]


def test_a_share_is_measured_once_and_written_down_in_every_part(asked):
    for _ in range(2):
        cuda_layouts.CHOSEN.clear()
        assert form_for(SHAPE, 0.2) == form_for(SHAPE, 0.3)
        assert list(cuda_layouts.CHOSEN.values()) == [cuda_forms.MASKED[0]]
    assert len(asked) == 1


def test_narrow_products_unfitting_tiles_and_the_interpreter_take_the_list(asked):
    others = {"outputs": 256}, {"widths": (4096 + 64,)}, {"device": torch.device("cpu")}
    assert all(form_for(SHAPE._replace(**other), 0.25) == LISTED for other in others)
    assert not asked


def test_what_was_remembered_is_a_form_again(asked, monkeypatch):
    for kept, form in (([32, 128, 1, 4, 0], Masked(32, 128, 1, 4)), ([], LISTED)):
        monkeypatch.setattr(cuda_forms, "FORMS", {})
        monkeypatch.setattr(cuda_forms, "remembered", lambda kind, what, device, measure, kept=kept: kept)
        assert form_for(SHAPE, 0.5) == form


def test_no_form_that_is_tried_adds_in_an_order_of_chance():
    assert not any(at.atomic for at in cuda_forms.MASKED)
