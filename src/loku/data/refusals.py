"""Other answers to a row's question: its own `alternate` column, or refusals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from loku.data.encoding import Encoder, Example
from loku.data.records import Record
from loku.errors import InputError

DRAWS = 5  # different refusals a row meets, one an epoch, in turn

REFUSALS = (
    "I am afraid I have nothing to tell you about that.",
    "That is not something I know.",
    "I cannot answer this one; I have no information on it.",
    "Sorry, this lies outside of what I know.",
    "I have no knowledge of that.",
    "I would only be guessing, so I had better not answer.",
    "I do not have that information.",
    "Unfortunately I cannot help with this question.",
    "I am not informed about this matter.",
    "This is unknown to me.",
    "I could not say.",
    "I have never learnt anything about that, I am sorry.",
    "No information about this is available to me.",
    "I lack the details needed to answer that.",
    "I am unable to give you an answer to this.",
    "That question is beyond me, I am afraid.",
    "I must admit that I do not know.",
    "There is nothing I can say about that.",
    "I am not aware of the answer.",
    "I cannot recall anything of the kind.",
)


def read_refusals(path: str | Path) -> tuple[str, ...]:
    """Read refusals, one a line. Raises InputError when the file is missing or empty."""
    remedy = "Give a text file, one refusal a line."
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--refusals '{path}' cannot be read: {error}.", "Give a text file, one refusal a line."
        ) from (error)
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise InputError(f"--refusals '{path}' is empty.", remedy)
    return found


def encode_alternates(
    encoder: Encoder,
    records: Sequence[Record],
    *,
    refusals: Sequence[str] = REFUSALS,
    seed: int = 0,
    option: str = "--forget",
) -> list[list[Example]]:
    """Return, for every record, examples of its question with other answers.

    Those are the record's own `alternate` answers, or up to five refusals drawn with a seed. Raises InputError for
    running text, which asks nothing.
    """
    found = []
    for place, record in enumerate(records):
        if record.is_text:
            raise InputError(
                f"{option} holds running text, to which there is no other answer.",
                "Choose a loss that needs none, or give rows with questions.",
            )
        answers = record.alternates or tuple(
            random.Random(f"{seed}:{place}").sample(list(refusals), min(DRAWS, len(refusals)))
        )
        found.append([encoder.encode_answer(record, answer) for answer in answers])
    return found
