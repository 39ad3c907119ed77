"""Writes docs/models.md, what each family of decoders gets: ``python tests/helpers/models_page.py``."""

from __future__ import annotations

from pathlib import Path

from decoders import FAMILIES, decoder_of

from resting.sparsifier import ACT, Decoder, UnsupportedModelError
from resting.sparsifier.decoding.gated import can_gate

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = Path(__file__).with_suffix(".md")


def row(family: str) -> list[str]:
    """One line of the table."""
    decoder = Decoder.of(decoder_of(family))
    roles = list(dict.fromkeys(site.group for site in decoder.sites()))
    mixture = next((found for found in decoder.found if found.experts), None)
    experts = f"{mixture.experts.per_token} of {mixture.experts.count}" if mixture and mixture.experts else ""
    acts = decoder.sites((ACT,))
    gated = [act for act in acts if len(decoder.rests_under_act(act)) > 1]
    act = "" if not acts else "yes" if gated else "zeros"
    kernels = "layers" if not experts else "layers but experts"
    kernels += ", rows under act" * any(can_gate(decoder, act) for act in acts if not act.is_expert)
    return [family, ", ".join(roles), f"{decoder.covered:.2f}", experts, act, kernels]


def page() -> str:
    """The whole page."""
    rows, refused = [], []
    for family in FAMILIES:
        try:
            rows.append(row(family))
        except UnsupportedModelError as error:
            said = str(error).partition(" Looked for ")[0]
            refused.append([family, said])
    lines = [HEAD.read_text() + "| family | sites | can rest | experts | act | kernels |", "|---|---|---:|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += ["", "## What is refused", "", "| family | why |", "|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
