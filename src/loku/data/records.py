"""Rows of any supported format as one type: `Record`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One thing the model can know: a question with its answer, a completion, a chat, or a text.

    Exactly one of three forms is filled:

    - `question` and `answer` (TOFU), rendered with the model's prompt template; with `verbatim` the two strings are
      used as they are (TRL's `prompt`/`completion`);
    - `messages`, a conversation rendered with the tokenizer's own chat template (TRL's conversational
      `prompt`/`completion` becomes one);
    - `text`, every token of which is supervised.

    `index` is the row's position in its source, and the only identity that results refer to.
    """

    index: int
    question: str | None = None
    answer: str | None = None
    verbatim: bool = False
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) pairs
    text: str | None = None
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    alternate: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether the row is running text, without a question."""
        return self.text is not None
