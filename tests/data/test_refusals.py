"""Other answers: the row's own, or refusals drawn with a seed."""

from __future__ import annotations

import pytest

from builders import byte_level_tokenizer
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.records import parse_rows
from loku.data.refusals import REFUSALS, encode_alternates, read_refusals
from loku.errors import InputError

ROWS = [{"question": f"Who is number {i}?", "answer": f"Number {i}."} for i in range(4)]


def answers(rows, **options):
    tokenizer = byte_level_tokenizer()
    examples = encode_alternates(Encoder(tokenizer, TagTemplate()), parse_rows(rows, "rows"), **options)
    return [
        [tokenizer.decode(e.input_ids[e.generation_length :], skip_special_tokens=True).strip() for e in row]
        for row in examples
    ]


def test_refusals_are_drawn_with_a_seed_and_differ_between_rows():
    first = answers(ROWS, seed=1)
    assert first == answers(ROWS, seed=1)
    assert first != answers(ROWS, seed=2)
    assert all(len(set(row)) == 5 and set(row) <= set(REFUSALS) for row in first)
    assert len({tuple(row) for row in first}) == len(ROWS)


def test_the_alternate_column_wins():
    rows = [ROWS[0] | {"alternate": "Nobody."}, ROWS[1] | {"alternate": ["A.", "B."]}, ROWS[2]]
    found = answers(rows)
    assert found[:2] == [["Nobody."], ["A.", "B."]]
    assert set(found[2]) <= set(REFUSALS)


def test_the_built_in_refusals_are_different_sentences():
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    assert all(text.endswith(".") and text == text.strip() for text in REFUSALS)


def test_refusals_from_a_file(tmp_path):
    file = tmp_path / "refusals.txt"
    file.write_text("No idea.\n\n  Ask me something else. \n")
    assert read_refusals(file) == ("No idea.", "Ask me something else.")
    file.write_text("\n")
    with pytest.raises(InputError, match=r"--refusals '.*' is empty.\nGive a text file, one refusal a line."):
        read_refusals(file)
    with pytest.raises(InputError, match=r"--refusals '.*' cannot be read: .*\nGive a text file"):
        read_refusals(tmp_path / "missing.txt")


def test_running_text_has_no_other_answer():
    with pytest.raises(InputError, match=r"--forget holds running text.*\nChoose a loss that needs none"):
        answers([{"text": "It was a dark night."}])
