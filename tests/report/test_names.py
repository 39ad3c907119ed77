"""Names of models as parts of the names of files and folders."""

from __future__ import annotations

import pytest

from resting.benchmarks.names import short, slug


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct (Q4_1, dequantised)", "smollm2-135m-instruct"),
        ("Qwen2.5-Coder-0.5B-Instruct", "qwen2-5-coder-0-5b-instruct"),
        ("--a  b__c--", "a-b-c"),
    ],
)
def test_a_model_as_part_of_a_folder_s_name(name, expected):
    assert slug(short(name)) == expected


def test_brackets_belong_to_a_name():
    assert slug("Llama-3-8B shape (random weights), bfloat16") == "llama-3-8b-shape-random-weights-bfloat16"
