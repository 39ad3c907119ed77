"""Every method has one look, whatever it stands beside, and is told from others without colour."""

from __future__ import annotations

import pytest

from resting.benchmarks import labels
from resting.benchmarks.page import methods
from resting.benchmarks.report import style
from resting.benchmarks.report.compared import wrapped

KNOWN = ["dense", *style.BARE, *(f"{wrapper}({base})" for wrapper in style.WRAPPED for base in style.BARE)]
OTHERS = [
    *("mine", "yours", "spon(mine)", "theirs(teal)", "spon(theirs(teal))", "teal, only down", "teal, only o"),
    *(f"spon(teal), {n} steps" for n in range(8)),
]


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("teal", ("", "teal", "")),
        ("spon(teal-greedy)", ("spon", "teal-greedy", "")),
        ("spon(teal), TEAL's thresholds (all)", ("spon", "teal", "TEAL's thresholds (all)")),
        ("mean-error(spon(cats)), 2 steps", ("mean-error", "cats", "2 steps")),
        ("teal, original", ("", "teal", "original")),
        ("spon(teal, nominal)", ("spon", "teal", "nominal")),
        ("spon(mean-error(teal, nominal)), c4", ("spon", "teal", "nominal, c4")),
    ],
)
def test_labels_are_taken_apart(label, parts):
    assert labels.split(label) == parts
    assert labels.innermost(label) == parts[1]


def test_known_methods_are_told_apart_without_colour():
    assert len({style.of(method).key for method in KNOWN}) == len(KNOWN)


def test_spon_refined_spon_and_mean_error_share_nothing():
    looks = [style.of(f"{wrapper}(teal)") for wrapper in ("spon", "spon-refined", "mean-error")]
    for name in ("colour", "fill", "dash"):
        assert len({getattr(look, name) for look in looks}) == 3


def test_a_look_does_not_depend_on_what_stands_beside_it():
    alone = {method: style.of(method) for method in KNOWN}
    together = style.styles([*OTHERS, *reversed(KNOWN)])
    assert {method: together[method] for method in KNOWN} == alone
    assert style.of("mine") == style.of("mine") != style.of("yours")


def test_unknown_methods_and_variants_are_told_apart_where_they_meet():
    looks = style.styles([*KNOWN, *OTHERS])
    assert len({look.key for look in looks.values()}) == len(looks)


def test_the_look_of_a_plug_in_is_the_same_on_every_machine():
    look = style.of("mine")
    assert (look.colour, look.marker, look.fill, look.dash) == ("#117733", "v", "none", (6.5, 1.2, 1.5, 1.2))


def test_colours_are_told_apart_by_those_who_see_no_red_or_green():
    """Distances after the projection of Viénot et al. (1999), in linear light."""

    def seen(colour):
        r, g, b = (((int(colour[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5))
        yellow = 0.11238 * r + 0.88762 * g
        return [v ** (1 / 3) for v in (yellow, yellow, 0.00401 * (r - g) + b if b else 0.0)]

    main = [
        "teal",
        "teal-greedy",
        "cats",
        "chess",
        "chess-attention",
        "rsparse",
        "wina",
        "spon(teal)",
        "spon-refined(teal)",
    ]
    found = {method: seen(style.of(method).colour) for method in main}
    for i, one in enumerate(main):
        for other in main[i + 1 :]:
            gap = sum((a - b) ** 2 for a, b in zip(found[one], found[other])) ** 0.5
            assert gap > 0.05, (one, other)


def test_the_page_and_the_plots_have_the_same_looks():
    page, plots = methods.looks([*KNOWN, *OTHERS]), style.styles(style.in_order([*KNOWN, *OTHERS]))
    assert {method: look[:3] for method, look in page.items()} == {
        method: [look.colour, look.marker, look.fill] for method, look in plots.items()
    }


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("spon(teal)", "teal"),
        ("spon(teal), down alone", "teal, down alone"),
        ("spon(teal), 400 steps", "teal"),
        ("spon(teal, nominal)", "teal, nominal"),
        ("spon(mean-error(teal, nominal)), 400 steps", "teal, nominal"),
        ("spon(cats, nominal)", None),  # plain CATS has other thresholds
        ("spon(chess)", None),
        ("teal, nominal", None),
        ("teal", None),
        ("teal (mine, too)", None),
    ],
)
def test_a_wrapper_is_held_against_what_it_wraps_and_never_itself(label, base):
    known = {(name, 0.5) for name in ("teal", "teal, nominal", "teal, down alone", "cats", label)}
    assert wrapped.base_of(label, 0.5, known) == base
    assert wrapped.base_of(label, 0.4, known) is None
