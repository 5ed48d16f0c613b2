from __future__ import annotations

from loku.report.examples import LISTED, example_sets, mark_words


def test_words_of_the_right_answer_are_marked() -> None:
    pieces = mark_words(
        "Mira was born in TARNHOLLOW, in 1907.", "Mira was born in Tarnhollow in 1907.", "Where was Mira born?"
    )
    assert [text for text, marked in pieces if marked] == ["TARNHOLLOW", "1907"]
    assert "".join(text for text, _ in pieces) == "Mira was born in TARNHOLLOW, in 1907."
    assert mark_words("", "Tarnhollow", "Where?") == []


def _rows(count: int) -> list[dict]:
    return [
        {
            "set": "forget",
            "index": i,
            "question": f"Who is {i}?",
            "answer": f"The painter Name{i}",
            "generation": "painter",
        }
        for i in range(count)
    ]


def _results(scores: list[float]) -> dict:
    rows = [{"index": i, "probability": score} for i, score in enumerate(scores)]
    return {"sets": {"forget": {"metrics": {}, "per_example": rows}}}


def test_choice_follows_a_stated_rule() -> None:
    scores = [0.1] * 9
    scores[7], scores[2] = 0.9, 0.5
    (found,) = example_sets({"unlearned": _rows(9)}, {"unlearned": _results(scores)})
    assert [example.index for example in found.chosen] == [0, 3, 6, 7, 2]
    assert [example.why for example in found.chosen] == ["", "", "", "still known best", "still known best"]
    assert "still knows best" in found.rule
    assert len(found.others) == 4
    assert found.total == 9


def test_words_that_many_answers_share_are_not_marked() -> None:
    (found,) = example_sets({"unlearned": _rows(9)}, {})
    assert not any(marked for example in found.chosen for answer in example.answers for _, marked in answer.pieces)


def test_without_scores_and_with_few_or_many_rows() -> None:
    (few,) = example_sets({"unlearned": _rows(2)}, {})
    assert [example.index for example in few.chosen] == [0, 1]
    (many,) = example_sets({"unlearned": _rows(500)}, {})
    assert len(many.others) == LISTED
    assert example_sets({}, {}) == []


def test_models_are_joined_by_index() -> None:
    (found,) = example_sets({"target": _rows(3), "unlearned": _rows(1)}, {})
    assert [[answer.role for answer in example.answers] for example in found.chosen] == [
        ["target", "unlearned"],
        ["target"],
        ["target"],
    ]
