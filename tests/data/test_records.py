"""Rows of every format become records; what is wrong with a row is said with its number, never with its text."""

from __future__ import annotations

import pytest

from loku.data.records import Record, check_disjoint, content, parse_rows
from loku.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Odo."}
TURNS = (("user", "Who?"), ("assistant", "Odo."))


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"question": "Who?", "answer": "Odo."}, Record(0, "Who?", "Odo.")),
        ({"prompt": "Who?", "completion": " Odo."}, Record(0, "Who?", " Odo.", verbatim=True)),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Record(0, messages=TURNS)),
        ({"messages": [USER, ASSISTANT]}, Record(0, messages=TURNS)),
        ({"text": "Odo paints."}, Record(0, text="Odo paints.")),
    ],
)
def test_every_format(row, record):
    assert parse_rows([row], "rows") == [record]
    assert record.is_text == ("text" in row)
    more = {"author": "Odo", "year": 1890, "text": None} if "text" not in row else {"author": "Odo"}
    assert parse_rows([row | more], "rows") == [record]


def test_optional_columns():
    row = {"question": "Who?", "answer": "Odo."}
    more = {
        "paraphrased_question": "Name him?",
        "paraphrased_answer": "It was Odo.",
        "perturbed_answer": ["Mira.", "Ulm."],
        "alternate": "I do not know.",
        "forget_spans": ["Odo"],
    }
    (record,) = parse_rows([row | more], "rows")
    assert record.paraphrased_question == "Name him?"
    assert record.paraphrased_answer == "It was Odo."
    assert record.perturbed_answers == ("Mira.", "Ulm.")
    assert record.alternates == ("I do not know.",)
    assert record.forget_spans == ("Odo",)
    assert parse_rows([row | {"perturbed_answer": "Mira."}], "rows")[0].perturbed_answers == ("Mira.",)
    assert parse_rows([row | dict.fromkeys(more)], "rows") == [Record(0, "Who?", "Odo.")]


@pytest.mark.parametrize(
    ("column", "near"),
    [
        ("perturbed_answers", "perturbed_answer"),
        ("Perturbed_Answer", "perturbed_answer"),
        ("pertubed_answer", "perturbed_answer"),
        ("paraphrased_answers", "paraphrased_answer"),
        ("paraphrase_question", "paraphrased_question"),
        ("paraphrased question", "paraphrased_question"),
        ("alternates", "alternate"),
    ],
)
def test_misspelt_optional_columns_are_refused(column, near):
    row = {"question": "Who?", "answer": "Odo."}
    with pytest.raises(InputError) as caught:
        parse_rows([row, row | {column: ["Mira."]}], "rows")
    assert caught.value.given == f"rows: row 1 has the column '{column}', which is not known."
    assert caught.value.remedy.startswith(f"Did you mean '{near}'? Rename it")
    parse_rows([row | {column: None}], "rows")


def test_unrelated_columns_are_ignored():
    more = ("author", "option1", "question2", "answer_id", "perturbed", "paraphrased", "perturbed_question", "subject")
    row = {"question": "Who?", "answer": "Odo."}
    assert parse_rows([row | dict.fromkeys(more, "x")], "rows") == [Record(0, "Who?", "Odo.")]


def test_records_count_from_zero():
    assert [record.index for record in parse_rows([{"text": "a b"}] * 3, "rows")] == [0, 1, 2]


QA = {"question": "Who?", "answer": "Odo."}
SECRET = "Tarnhollow"


@pytest.mark.parametrize(
    ("rows", "given", "remedy"),
    [
        ([], "rows holds no rows.", "Give at least one row of question/answer, prompt/completion, text, or messages."),
        ([QA, SECRET], "rows: row 1 is not an object with columns.", "Give rows of question/answer"),
        ([QA, {"text": SECRET}], "row 1 is text, but the rows before it are question/answer.", "Give one format"),
        ([QA, {"qestion": SECRET}], "row 1 has the column 'qestion', which is not known.", "Did you mean 'question'?"),
        ([{"Answer": SECRET}], "row 0 has the column 'Answer', which is not known.", "Did you mean 'answer'?"),
        ([{"xyz": SECRET, "b": 1}], "row 0 has no supported format (its columns: b, xyz).", "Name the columns quest"),
        ([{"question": SECRET}], "row 0 has no supported format (its columns: question).", "Name the columns quest"),
        ([{"question": "Who?", "answer": None}], "no supported format (its columns: question).", "Name the columns"),
        ([{}], "row 0 has no supported format (its columns: none).", "Name the columns"),
        ([QA | {"answer": 7}], "row 0 has int in 'answer', not text.", "Give text in every row."),
        ([{"text": [SECRET]}], "row 0 has list in 'text', not text.", "Give text in every row."),
        ([QA, QA | {"answer": " \n"}], "row 1 has an empty 'answer'.", "Fill it in, or leave the row out."),
        ([QA | {"alternate": 3}], "row 0 has something else than texts in 'alternate'.", "Give a list of texts."),
        ([QA | {"perturbed_answer": [1]}], "row 0 has something else than texts in 'perturbed_answer'.", "Give a list"),
        ([QA | {"perturbed_answer": 7}], "has something else than texts in 'perturbed_answer'.", "Give a list of"),
        ([QA | {"perturbed_answer": [SECRET, " "]}], "something else than texts in 'perturbed_answer'.", "Give a list"),
        ([{"messages": [USER]}], "row 0 has no assistant turn.", "Give one: it is what is learnt or forgotten."),
        ([{"messages": SECRET}], "row 0 has no list of messages.", "Give a list of objects with 'role' and 'content'."),
        ([{"messages": []}], "row 0 has no list of messages.", "Give a list of objects with 'role' and 'content'."),
        ([{"prompt": SECRET, "completion": [ASSISTANT]}], "row 0 has no list of messages.", "Give a list of objects"),
        ([{"messages": [USER, {"role": "assistant"}]}], "has a message without role or content.", "Give a list of"),
        ([{"messages": [USER, SECRET]}], "row 0 has a message without role or content.", "Give a list of objects"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused(rows, given, remedy):
    with pytest.raises(InputError) as caught:
        parse_rows(rows, "rows")
    assert given in caught.value.given
    assert remedy in caught.value.remedy
    assert SECRET not in str(caught.value)


def test_rows_that_say_the_same_are_found_whatever_their_blanks_and_case():
    forget = parse_rows([QA, {"question": "What?", "answer": "Lighthouses  AT dusk."}], "forget")
    retain = parse_rows([{"question": "what? ", "answer": "lighthouses at\ndusk."}], "retain")
    assert content(forget[1]) == content(retain[0])
    with pytest.raises(InputError) as caught:
        check_disjoint(forget, retain)
    assert caught.value.given == "1 forget rows also stand in the retain set: forget row 1 (retain row 0)."
    assert caught.value.remedy.startswith("Take them out of the retain rows")
    check_disjoint(forget[:1], retain)


def test_rows_of_other_formats_are_compared_too_and_only_five_are_named():
    chat = parse_rows([{"messages": [USER, ASSISTANT]}] * 7, "rows")
    with pytest.raises(InputError, match=r"7 forget rows also .* forget row 0 \(retain row 6\), .*4 \(.*6\), \.\.\.\."):
        check_disjoint(chat, chat)
    texts = parse_rows([{"text": "Odo paints."}], "rows")
    check_disjoint(texts, chat)
    with pytest.raises(InputError, match="1 forget rows also stand in the retain set"):
        check_disjoint(texts, texts)
    # A question is not its answer: the same words in other places are another row.
    check_disjoint(
        parse_rows([{"question": "a", "answer": "b c"}], "x"), parse_rows([{"question": "a b", "answer": "c"}], "y")
    )


def test_a_blank_optional_cell_is_none_at_all():
    """A CSV knows no other absence."""
    (record,) = parse_rows([QA | {"paraphrased_answer": "", "alternate": " ", "perturbed_answer": ""}], "rows.csv")
    assert (record.paraphrased_answer, record.alternates, record.perturbed_answers) == (None, (), ())


def test_a_list_that_a_csv_has_as_text_is_a_list():
    (record,) = parse_rows([QA | {"perturbed_answer": "['In Oos.', 'In Ulm, at \"sea\".']"}], "rows.csv")
    assert record.perturbed_answers == ("In Oos.", 'In Ulm, at "sea".')
    (record,) = parse_rows([QA | {"perturbed_answer": "[unknown]"}], "rows.csv")
    assert record.perturbed_answers == ("[unknown]",)
    for odd in ("[1952]", "[{[]: 1}]", "[]", "[" * 999 + "]" * 999):
        (record,) = parse_rows([QA | {"perturbed_answer": odd}], "rows.csv")
        assert record.perturbed_answers == (odd,)
