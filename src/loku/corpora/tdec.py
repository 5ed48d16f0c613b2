"""A small TDEC: real sequences of the extraction challenge, repeated in English text until a small model has them.

    train.jsonl         passages of books, other challenge sequences, and those to forget, `repeats` times each
    retain-train.jsonl  the same with other passages in their place: for the retain-only model and the tokenizer
    forget.jsonl        the sequences that must go
    retain.jsonl        what stays: other challenge sequences and passages, all of them in the training text
    unseen.jsonl        challenge sequences that were never trained on: their EL_10 and MA are the level
    validation.jsonl    passages of held-out books, for perplexity
    cloze.jsonl         passages of held-out books up to a word that they name before, as LAMBADA asks for the last

The sequences are those of Jang et al. 2023 (arXiv 2210.01504): draw 0 of 32 must go, draw 1 is never seen, what is
left of the others is the once-seen text of their kind, without which the level of unseen text would mean nothing.
All are cut after `characters` characters (0: whole), since EL_10 takes the square of the length in decoded tokens.

The repeats are spread over all of the training, as in a real corpus. A small GPT-Neo that first learnt to read and
then met the sequences did not take them in: it had settled for predicting from the last words alone.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
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
    forget, unseen = draws[0], draws[1]
    kept = {row["doc_id"] for row in (*forget, *unseen)}
    others = {row["doc_id"]: row for rows in draws[2:] for row in rows if row["doc_id"] not in kept}
    apart = {row["text"] for row in (*forget, *unseen)}  # two files of a licence may begin alike
    kin = [{"text": row["text"]} for row in others.values() if row["text"] not in apart]
    _enough(books, passages + repeats * len(forget), BOOKS)
    rng.shuffle(books)
    rng.shuffle(held_out)
    asked = [row for passage in held_out[validation:] if (row := named_word(passage, rng)) is not None]
    _enough(asked, cloze, HELD_OUT)
    once, instead = books[:passages], books[passages : passages + repeats * len(forget)]
    targets = [{"text": row["text"]} for row in forget]
    write_rows(folder / "train.jsonl", _shuffled([*once, *kin, *targets * repeats], rng))
    write_rows(folder / "retain-train.jsonl", _shuffled([*once, *kin, *instead], rng))
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "unseen.jsonl", unseen)
    write_rows(folder / "retain.jsonl", _shuffled([*kin, *once[: len(kin)]], rng))
    write_rows(folder / "validation.jsonl", held_out[:validation])
    write_rows(folder / "cloze.jsonl", asked[:cloze])


def named_word(row: Row, rng: random.Random) -> Row | None:
    """Return a passage up to some word of its second half that it names before, as a question for that word, or None.

    Most of LAMBADA's words stand in their passage (Paperno et al. 2016), which is what makes them guessable at all. A
    sentence's last word, which LAMBADA asks for, is beyond models of this size (1 % right); so any word is asked for.
    """
    text = row["text"]
    found = [
        match
        for match in WORD.finditer(text, len(text) // 2)
        if match.group().strip() in re.findall(r"[A-Za-z]+", text[: match.start()])
    ]
    if not found:
        return None
    word = rng.choice(found)
    return {"prompt": text[: word.start()], "completion": word.group()}


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
