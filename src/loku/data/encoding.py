"""Records as token ids with answer-only labels. Prompt and answer boundaries are checked, not assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loku.data.prompts import ChatTemplate, TagTemplate, render_chat
from loku.data.records import Record
from loku.errors import InputError
from loku.files import sha256_json

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One sequence. `labels` equal `input_ids` where supervised and are -100 elsewhere (transformers shifts them).

    `index` is the record's; `prompt_length` counts the ids before the first supervised one, `generation_length` those
    before the first id of the answer itself. They differ only where the answer tag is supervised. `weights` says how
    much each supervised token counts; None means 1 each.
    """

    index: int
    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    generation_length: int
    weights: tuple[float, ...] | None = None

    @property
    def token_weights(self) -> tuple[float, ...]:
        """Each token's weight: 0 where it is not supervised."""
        given = self.weights or (1.0,) * len(self.labels)
        return tuple(0.0 if label == IGNORE else weight for label, weight in zip(self.labels, given, strict=True))


def tokens_sha256(examples: Iterable[Example]) -> str:
    """Return a hash of what examples are to a model, whichever tokenizer and template made it."""
    return sha256_json([(list(example.input_ids), list(example.labels)) for example in examples])


@dataclass(frozen=True)
class EncodingCounts:
    """What encoding did: rows in, sequences out, and what had to be cut or shifted on the way."""

    rows: int
    sequences: int
    windows_cut: int
    truncated: int
    supervised_tokens: int
    shifted_boundaries: int


@dataclass(frozen=True)
class EncodedSet:
    """A record set as examples."""

    name: str
    examples: list[Example]
    counts: EncodingCounts


class Encoder:
    """Turns records into examples for one tokenizer and template, at most `max_length` tokens each.

    Answers end with the end-of-sequence token, which is supervised (chat turns end with what the template says).
    Running text is cut into windows that overlap by one token, so that every token but the first is predicted once.
    """

    def __init__(
        self, tokenizer: Any, template: TagTemplate | ChatTemplate, max_length: int = 500, *, text_eos: bool = False
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token.",
                "Set one (tokenizer.eos_token = ...): without it no answer ever ends.",
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.text_eos = text_eos

    def encode(self, record: Record, option: str = "--forget") -> list[Example]:
        """Return the record's examples: several windows for a long text, one otherwise."""
        if record.is_text:
            return self._windows(record)
        return [self._encode_one(record, option)[0]]

    def encode_answer(
        self, record: Record, answer: str, question: str | None = None, option: str = "--forget"
    ) -> Example:
        """Encode another answer (or question) in place of the record's own: for candidate answers."""
        example, _, _ = self._tags_or_chat(record, question or record.question, answer, option)
        return example

    def encode_records(self, records: Iterable[Record], option: str = "--forget") -> EncodedSet:
        """Encode all records and count what was cut. Raises InputError when no answer token of a row is left."""
        examples: list[Example] = []
        rows = windows_cut = truncated = shifted = 0
        for record in records:
            rows += 1
            if record.is_text:
                windows = self._windows(record)
                windows_cut += len(windows) > 1
                examples += windows
                continue
            example, was_truncated, was_shifted = self._encode_one(record, option)
            examples.append(example)
            truncated += was_truncated
            shifted += was_shifted
        supervised = sum(label != IGNORE for example in examples for label in example.labels[1:])
        if not supervised:
            raise InputError(f"{option} holds no token to learn from.", "Give rows with answers or text.")
        name = getattr(records, "name", option)
        return EncodedSet(
            name, examples, EncodingCounts(rows, len(examples), windows_cut, truncated, supervised, shifted)
        )

    def _encode_one(self, record: Record, option: str) -> tuple[Example, bool, bool]:
        if record.messages:
            ids, labels, first, last = self._chat(list(record.messages), record.index, option)
            return self._fit(record, ids, labels, first, last, option), len(ids) > self.max_length, False
        return self._tags_or_chat(record, record.question, record.answer, option)

    def _tags_or_chat(
        self, record: Record, question: str | None, answer: str | None, option: str
    ) -> tuple[Example, bool, bool]:
        if answer is None:
            raise InputError(f"{option} row {record.index} has no answer.", "Give rows with a question and an answer.")
        if record.messages:
            messages = list(record.messages)
            last = max(i for i, (role, _) in enumerate(messages) if role == "assistant")
            messages[last] = ("assistant", answer)
            ids, labels, first, generation = self._chat(messages[: last + 1], record.index, option)
            shifted = False
        elif isinstance(self.template, ChatTemplate) and not record.verbatim:
            messages = [(m["role"], m["content"]) for m in self.template.messages(question or "")]
            ids, labels, first, generation = self._chat([*messages, ("assistant", answer)], record.index, option)
            shifted = False
        else:
            ids, first, generation, shifted = self._tags(record, question or "", answer)
            labels = [IGNORE] * first + ids[first:]
        return self._fit(record, ids, labels, first, generation, option), len(ids) > self.max_length, shifted

    def _tags(self, record: Record, question: str, answer: str) -> tuple[list[int], int, int, bool]:
        """Encode prompt and answer jointly, and find where the prompt ends in the joint ids."""
        supervised_from = None
        if record.verbatim:
            prompt = question
        else:
            assert isinstance(self.template, TagTemplate)
            prompt = self.template.prompt(question)
            if self.template.supervise_answer_tag:
                supervised_from = self.template.question(question)
        ids = self._ids(prompt + answer)
        generation, shifted = self._boundary(prompt, ids)
        first = generation if supervised_from is None else self._boundary(supervised_from, ids)[0]
        return [*ids, self.tokenizer.eos_token_id], first, generation, shifted

    def _boundary(self, prompt: str, ids: Sequence[int]) -> tuple[int, bool]:
        """Return how many ids belong to the prompt alone, and whether a token straddles its end.

        Blanks at the prompt's end belong to the answer's first word in most vocabularies, so they are left to it. When
        the prompt's own ids are still no prefix of the joint ids, the answer starts at the first id that differs.
        """
        alone = self._ids(prompt.rstrip(" "))
        common = 0
        while common < min(len(alone), len(ids)) and alone[common] == ids[common]:
            common += 1
        return common, common < len(alone)

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        # A special token that the tokenizer puts at the end would come between an answer and its continuation.
        while ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids.pop()
        return ids

    def _chat(self, messages: list[tuple[str, str]], index: int, option: str) -> tuple[list[int], list[int], int, int]:
        """Encode a conversation turn by turn; assistant turns are supervised, end-of-turn marker included.

        Returns ids, labels and where the first and the last assistant turn begin.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{option} holds `messages`, but the tokenizer has no chat template.",
                "Set tokenizer.chat_template, or give question/answer rows with --prompt-template.",
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        ids: list[int] = []
        labels: list[int] = []
        first, last = None, 0
        for end, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt = self._render(turns[:end], f"{option} row {index}", generation=True)
            full = self._render(turns[: end + 1], f"{option} row {index}", generation=False)
            if full[: len(prompt)] != prompt and prompt[: len(ids)] == ids:
                raise InputError(
                    f"{option} row {index}: what the tokenizer's chat template writes before an answer to come "
                    "(such as '<think>') is not what stands before an answer that is there.",
                    "Set tokenizer.chat_template to one that writes both alike, or give tags by --prompt-template.",
                )
            if prompt[: len(ids)] != ids:
                raise InputError(
                    f"{option} row {index}: the tokenizer's chat template renders turn {end + 1} differently once more "
                    "turns follow.",
                    "Give single-turn rows, or a template that only appends (no stripping of earlier turns).",
                )
            labels += [IGNORE] * (len(prompt) - len(ids)) + full[len(prompt) :]
            ids = full
            first, last = len(prompt) if first is None else first, len(prompt)
        if first is None:
            raise InputError(f"{option} row {index} has no assistant turn.", "Give one to each row.")
        return ids, labels, first, last

    def _render(self, turns: list[dict[str, str]], where: str, *, generation: bool) -> list[int]:
        text = render_chat(self.tokenizer, turns, generation=generation, where=where)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fit(
        self, record: Record, ids: list[int], labels: list[int], first: int, generation: int, option: str
    ) -> Example:
        if first >= self.max_length:
            raise InputError(
                f"{option} row {record.index} has no answer token left: its prompt alone has {first} tokens, "
                f"the limit is {self.max_length}.",
                "Raise --max-length, or shorten the row.",
            )
        cut = slice(None, self.max_length)
        if first == 0:  # nothing predicts the first token
            labels = [IGNORE, *labels[1:]]
        return Example(record.index, ids[cut], labels[cut], first, min(generation, self.max_length))

    def _windows(self, record: Record) -> list[Example]:
        ids = self._ids(record.text or "")
        if self.text_eos:
            ids = [*ids, self.tokenizer.eos_token_id]
        if len(ids) < 2:
            raise InputError(
                f"Row {record.index} is a text of {len(ids)} tokens: nothing in it can be predicted.",
                "Leave it out, or give longer texts.",
            )
        windows = []
        for start in range(0, len(ids) - 1, self.max_length - 1):
            window = ids[start : start + self.max_length]
            windows.append(Example(record.index, window, [IGNORE, *window[1:]], 1, 1))
        return windows
