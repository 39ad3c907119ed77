"""A folder with random weights is one that transformers loads, the same every time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = "random_folder"


@pytest.mark.parametrize("tied", [True, False])
def test_it_holds_every_weight_of_the_shape(script, tmp_path, tied):
    config = script.config_of("tiny", tie_word_embeddings=tied)
    size = script.write(config, tmp_path / "one")
    script.write(config, tmp_path / "two")
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True) for name in ("one", "two")
    )
    assert not any(one[1].values())  # nothing is missing, nothing is left over
    parameters = dict(one[0].named_parameters())
    assert size == sum(2 * p.numel() for p in parameters.values())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    for name, parameter in parameters.items():
        assert torch.equal(parameter, dict(two[0].named_parameters())[name])
        expected = 0.0 if parameter.dim() < 2 else config.initializer_range
        assert float(parameter.detach().float().std()) == pytest.approx(expected, rel=0.1)
    with torch.no_grad():
        assert torch.isfinite(one[0](torch.arange(9)[None]).logits).all()


def test_a_folder_that_is_there_is_left_alone(script, tmp_path):
    with pytest.raises(FileExistsError):
        script.write(script.config_of("tiny"), tmp_path)
    assert not list(tmp_path.iterdir())
