"""Errors carry both halves."""

from __future__ import annotations

import copy

import pytest

from loku.errors import DivergenceError, InputError, LokuError, suggestion


def test_both_halves_are_in_the_message():
    error = InputError("This was given.", "Do that.")
    assert str(error) == "This was given.\nDo that."
    assert isinstance(error, ValueError)


def test_suggestion_names_the_nearest_or_all():
    assert suggestion("forgt", ["forget", "retain"]) == "Did you mean 'forget'?"
    assert suggestion("zzz", ["b", "a"]) == "Valid names are: a, b."
    assert suggestion("zzz", ["b, rank 4", "a"]) == "Valid names are: 'a', 'b, rank 4'."


@pytest.mark.parametrize("kind", [LokuError, InputError, DivergenceError])
def test_errors_survive_the_way_back_from_a_worker_process(kind):
    error = copy.copy(kind("That was given.", "Do this."))  # takes the same way as pickling does
    assert type(error) is kind
    assert (error.given, error.remedy) == ("That was given.", "Do this.")
