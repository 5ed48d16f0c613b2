"""Dialogue F1 against a slow count, prompts, rows, and a file measured."""

from __future__ import annotations

import json
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import byte_level_tokenizer, tiny_model
from loku.errors import InputError
from loku.evaluation.dialogue import dialogue_prompt, first_line, load_dialogues, measure_dialogues, unigram_f1
from loku.evaluation.probing import continue_texts


def reference(reply, wanted):
    """F1 word by word: pairs equal words off, one at a time."""

    def words(text):
        kept = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    ours, left = words(reply), words(wanted)
    total, common = len(left), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return Fraction(0)
    precision, recall = Fraction(common, len(ours)), Fraction(common, total)
    return 2 * precision * recall / (precision + recall)


WORDS = st.lists(st.sampled_from(["The", "a", "fox", "Fox!", "dog,", "an", "jumps", "--", "it's"]), max_size=8)


@given(WORDS, WORDS)
def test_f1_is_the_slow_count(ours, theirs):
    assert unigram_f1(" ".join(ours), " ".join(theirs)) == pytest.approx(
        float(reference(" ".join(ours), " ".join(theirs)))
    )


def test_f1_by_hand():
    assert unigram_f1("The quick fox.", "a quick, brown FOX") == pytest.approx(4 / 5)
    assert unigram_f1("fox fox", "fox") == pytest.approx(2 / 3)  # counted as often as both have it
    assert unigram_f1("", "fox") == unigram_f1("fox", "") == unigram_f1("", "") == 0.0
    assert unigram_f1("the", "The") == 0.0  # nothing is left of either
    assert unigram_f1("it's", "its") == 0.0  # punctuation parts words, as in ParlAI


def test_prompts():
    assert dialogue_prompt(["Hi"]) == "User 1: Hi\nUser 2:"
    assert dialogue_prompt(["Hi", "Hello", "Who?"]) == "User 1: Hi\nUser 2: Hello\nUser 1: Who?\nUser 2:"
    assert dialogue_prompt(["Hi", "Hello"]) == "User 1: Hi\nUser 2: Hello\nUser 1:"
    assert first_line("\n I am.\nUser 1: So?") == "I am."


def test_rows(tmp_path):
    file = tmp_path / "talk.jsonl"

    def write(*made):
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return file

    found = load_dialogues(write({"context": "Hi", "reply": "Ho"}, {"text": ["a", "b", "c"]}))
    assert found.rows == ({"context": ["Hi"], "reply": "Ho"}, {"context": ["a", "b"], "reply": "c"})
    for bad in ({"context": [], "reply": "x"}, {"context": "Hi"}, {"text": ["a"]}, {"text": "a b"}, {"context": 3}):
        with pytest.raises(InputError, match=r"row 0 is no dialogue\.\nGive rows with `context`"):
            load_dialogues(write(bad))


def test_a_set_of_dialogues(tmp_path):
    file = tmp_path / "talk.jsonl"
    made = [{"context": [f"Who wrote it, {n}?"], "reply": "She wrote it."} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    rows = load_dialogues(file)
    sets, texts = measure_dialogues(
        tiny_model(), byte_level_tokenizer(), {"dialogue_talk": rows}, max_rows=3, max_new_tokens=12, keep_text=True
    )
    prompts = [f"User 1: Who wrote it, {n}?\nUser 2:" for n in range(3)]
    said = continue_texts(tiny_model(), byte_level_tokenizer(), prompts, max_new_tokens=12)
    expected = [float(reference(first_line(text), "She wrote it.")) for text in said]
    assert [row["f1"] for row in sets["dialogue_talk"].per_example] == pytest.approx(expected)
    assert [row["generation"] for row in texts] == [first_line(text) for text in said]
    assert sets["dialogue_talk"].metrics["f1"].mean == pytest.approx(sum(expected) / 3)
