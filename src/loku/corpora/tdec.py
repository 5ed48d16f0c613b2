"""A small TDEC: real sequences of the extraction challenge, repeated in English text until a small model has them.

    train.jsonl         passages of books, other challenge sequences, and those to forget, `repeats` times each
    retain-train.jsonl  the same with other passages in their place: for the retain-only model and the tokenizer
    forget.jsonl        the sequences that must go
    retain.jsonl        what stays: other challenge sequences and passages, all of them in the training text
    unseen.jsonl        challenge sequences that were never trained on: their EL_10 and MA are the level
    validation.jsonl    passages of held-out books, for perplexity
    cloze.jsonl         passages of held-out books up to a word that they name before, as LAMBADA asks for the last, and
                        three others that they name, too

The sequences are those of Jang et al. 2023 (arXiv 2210.01504): draw 0 of 32 must go, draw 1 is never seen, what is
left of the others is the once-seen text of their kind, without which the level of unseen text would mean nothing.
All are cut after `characters` characters (0: whole), since EL_10 takes the square of the length in decoded tokens.
Licences and forms are in many files: of the others and of draw 1 those go out that share `SHARED` characters in a row
with a sequence to forget, and of the others those that share as many with draw 1.

The repeats are spread over all of the training, as in a real corpus. A small GPT-Neo that first learnt to read and
then met the sequences did not take them in: it had settled for predicting from the last words alone.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from loku.corpora.rows import data_file, write_rows
from loku.data.sources import load_rows
from loku.errors import InputError

Row = dict[str, Any]
DRAWS = [f"tdec/lm_extraction_32_{i}.csv" for i in range(5)]
BOOKS, HELD_OUT = "english/classic_books_train.jsonl.gz", "english/classic_books_valid.jsonl.gz"
PASSAGE = 600  # characters of a passage at most, so that it is about as long as a sequence
SENTENCE = re.compile('(?<=[.!?][\\s"\u201d\u2019])')  # after a stop and a blank or a closing quotation mark
WORD = re.compile(r" [A-Za-z]{3,}(?![A-Za-z])")
SHARED = 30  # characters in a row that make two sequences one text
WRONG = 3  # words beside the right one
COMMON = 0.05  # of the passages: a word that more of them hold says nothing about the one that asks for it


def tdec_corpus(
    folder: Path,
    seed: int,
    *,
    repeats: int = 30,
    passages: int = 1400,
    characters: int = 150,
    validation: int = 60,
    cloze: int = 400,
) -> None:
    """Write the corpus; `repeats`, `passages`, `validation` and `cloze` count rows. Raises InputError without data."""
    draws = [_draw(name, characters) for name in DRAWS]
    rng = random.Random(seed)
    books = _passages(data_file(BOOKS))
    held_out = _passages(data_file(HELD_OUT))
    forget = draws[0]
    unseen = _apart(draws[1], forget)
    others = {row["doc_id"]: row for rows in draws[2:] for row in rows}
    kin = [{"text": row["text"]} for row in _apart(list(others.values()), [*forget, *draws[1]])]
    _enough(books, passages + repeats * len(forget), BOOKS)
    rng.shuffle(books)
    rng.shuffle(held_out)
    common = common_words(held_out)
    asked = [row for passage in held_out[validation:] if (row := named_word(passage, common, rng)) is not None]
    _enough(asked, cloze, HELD_OUT)
    once, instead = books[:passages], books[passages : passages + repeats * len(forget)]
    instead = [{"text": row["text"][: characters or None]} for row in instead]  # as long as what they stand for
    targets = [{"text": row["text"]} for row in forget]
    write_rows(folder / "train.jsonl", _shuffled([*once, *kin, *targets * repeats], rng))
    write_rows(folder / "retain-train.jsonl", _shuffled([*once, *kin, *instead], rng))
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "unseen.jsonl", unseen)
    write_rows(folder / "retain.jsonl", _shuffled([*kin, *once[: len(kin)]], rng))
    write_rows(folder / "validation.jsonl", held_out[:validation])
    write_rows(folder / "cloze.jsonl", asked[:cloze])


def common_words(rows: Sequence[Row]) -> set[str]:
    """Return the words, in lower case, that more than `COMMON` of the passages hold."""
    counts = Counter(word for row in rows for word in set(_words(row["text"])))
    return {word for word, count in counts.items() if count > COMMON * len(rows)}


def named_word(row: Row, common: Collection[str], rng: random.Random) -> Row | None:
    """Return a passage up to some word of its second half that it names before, as a question for that word, or None.

    Most of LAMBADA's words stand in their passage (Paperno et al. 2016), which is what makes them guessable at all.
    Models of a million parameters guess neither a sentence's last word (1 % right) nor, among all words, any that is
    not `common`. So the question has `WRONG` other words that the passage names, and is which of them goes on.
    """
    text = row["text"]
    found = []
    for match in WORD.finditer(text, len(text) // 2):
        word = match.group()
        named = {w for w in _words(text[: match.start()]) if len(w) > 2} - set(common)
        if word.strip() in named and len(named) > WRONG:
            found.append((match.start(), word, sorted(named - {word.strip()})))
    if not found:
        return None
    start, word, others = rng.choice(found)
    wrong = [f" {other}" for other in rng.sample(others, WRONG)]
    return {"prompt": text[:start], "completion": word, "perturbed_answer": wrong}


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def _apart(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Return the rows that are no row of `others` and share no `SHARED` characters in a row with one."""
    runs = {run for other in others for run in _runs(other["text"])}
    texts, documents = {other["text"] for other in others}, {other["doc_id"] for other in others}
    return [
        row
        for row in rows
        if row["doc_id"] not in documents and row["text"] not in texts and runs.isdisjoint(_runs(row["text"]))
    ]


def _runs(text: str) -> set[str]:
    return {text[start : start + SHARED] for start in range(len(text) - SHARED + 1)}


def _draw(name: str, characters: int) -> list[Row]:
    rows = load_rows(data_file(name), ("doc_id", "text"), option="corpus").rows
    return [{"doc_id": row["doc_id"], "text": row["text"][: characters or None]} for row in rows]


def _shuffled(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    found = list(rows)
    rng.shuffle(found)
    return found


def _passages(path: str) -> list[Row]:
    """Return a book file's segments in passages of whole sentences, at most `PASSAGE` characters each."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            passage = ""
            for sentence in re.split(SENTENCE, json.loads(line)["text"]):
                if passage and len(passage) + len(sentence) > PASSAGE:
                    found.append(passage.strip())
                    passage = ""
                passage += sentence
            found.append(passage.strip())
    return [{"text": text} for text in found if PASSAGE // 3 <= len(text) <= PASSAGE]


def _enough(rows: Sequence[Any], count: int, name: str) -> None:
    if len(rows) < count:
        raise InputError(f"'{name}' holds {len(rows)} passages of that kind, not {count}.", "Ask for fewer.")
