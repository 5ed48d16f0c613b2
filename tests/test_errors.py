"""Errors carry both halves."""

from __future__ import annotations

from loku.errors import InputError, suggestion


def test_both_halves_are_in_the_message():
    error = InputError("This was given.", "Do that.")
    assert str(error) == "This was given.\nDo that."
    assert isinstance(error, ValueError)


def test_suggestion_names_the_nearest_or_all():
    assert suggestion("forgt", ["forget", "retain"]) == "Did you mean 'forget'?"
    assert suggestion("zzz", ["b", "a"]) == "Valid names are: a, b."
