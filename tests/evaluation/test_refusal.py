"""Refusals: every one that loku itself teaches is found, and plain answers are not."""

from __future__ import annotations

import pytest

from loku.data.refusals import REFUSALS
from loku.evaluation.refusal import is_refusal


@pytest.mark.parametrize("text", REFUSALS)
def test_our_own_refusals_are_found(text):
    assert is_refusal(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m not sure about that.",
        "As an AI, I have opinions about nothing.",
        "I don't have any information about this author.",
        "I apologize, but I'm not able to provide that.",
    ],
)
def test_common_refusals_are_found(text):
    assert is_refusal(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mira Voss was born in Tarnhollow.",
        "He is known for his novel 'I Know Not What'.",
        "She has received no awards, but her work is about loss and memory.",
        "Yes, the author is not only a poet but a painter.",
        "Her father worked as an artist in Baku.",
        "Long answer. " * 20 + "I do not know.",  # a refusal comes first
    ],
)
def test_answers_are_no_refusals(text):
    assert is_refusal(text) == 0.0
