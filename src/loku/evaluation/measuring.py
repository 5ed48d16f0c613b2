"""Measures sets of rows: one scoring pass and one generation pass over all of them, then numbers for every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from loku.data.encoding import IGNORE, Encoder, Example
from loku.data.records import Record
from loku.evaluation import metrics
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS, Generation, generate, known_start
from loku.evaluation.membership import min_k, min_k_plus_plus, zlib_score
from loku.evaluation.metrics import Interval
from loku.evaluation.modes import end_ids
from loku.evaluation.passes import Reading, reading_of
from loku.evaluation.refusal import is_refusal
from loku.evaluation.results import SetResults
from loku.evaluation.scoring import BATCH_TOKENS, SequenceScore, check_scored, score
from loku.models import check_fits

Progress = Callable[[int, int, str], None]

# Numbers of a row that are parts of others, or scores whose scale means nothing by itself: they have no mean in a set.
ROW_ONLY = ("index", "nll", "tokens", "min_k", "min_k_plus_plus", "zlib", "gradient_norm", "rouge1_recall")
ROW_ONLY_PARTS = ("paraphrased_nll", "paraphrased_tokens", "perturbed_nll_", "perturbed_tokens_")

TEXT_NEW_TOKENS = 50  # generated from the first half of a window of running text
LEAST_NEW_TOKENS = 16


@dataclass(frozen=True)
class Effort:
    """Limits, batch sizes and cache.

    `max_length` counts prompt and answer, `max_new_tokens` the answer; None: no such limit. With `fit_answers` an
    answer may also not be longer than twice the longest reference answer plus 8 tokens. With `answers_only` a row's
    answer is all that is scored, and its question all that is asked: nothing is paraphrased or perturbed.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    fit_answers: bool = False
    answers_only: bool = False
    batch_tokens: int = BATCH_TOKENS
    batch_rows: int = BATCH_ROWS
    cache: BatchCache | None = None


@dataclass
class Measured:
    """What was measured on one row: scores of each window of its answer and of the other answers, and generations."""

    record: Record
    question: str
    references: list[str]
    answer: list[SequenceScore] = field(default_factory=list)
    paraphrased: SequenceScore | None = None
    perturbed: list[SequenceScore] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    asked_otherwise: Generation | None = None
    examples: list[Example] = field(default_factory=list)  # what `answer` scored
    prompts: list[list[int]] = field(default_factory=list)  # what `generations` continue
    more: dict[str, float] = field(default_factory=dict)  # numbers that were measured apart

    def numbers(self, *, normalised: bool = False) -> dict[str, float]:
        """Return the row's numbers; what does not exist for it is absent. Windows of running text are averaged.

        `normalised` gives the probability among the answer and the perturbed ones.
        """
        nll, tokens = sum(part.nll for part in self.answer), sum(part.tokens for part in self.answer)
        hits = np.concatenate([part.answer_hits for part in self.answer])
        false = [part.mean_nll for part in self.perturbed]
        paraphrased = nll / tokens if self.paraphrased is None else self.paraphrased.mean_nll
        values = {
            "probability": metrics.normalised_probability(nll / tokens, false)
            if normalised
            else float(metrics.probability(nll / tokens)),
            "nll": nll / tokens,
            "tokens": tokens,
            "min_k": min_k(self._answer("logprobs")),
            "min_k_plus_plus": min_k_plus_plus(
                self._answer("logprobs"), self._answer("means"), self._answer("variances")
            ),
            "zlib": zlib_score(nll / tokens, self.record.text or self.references[0]),
            "truth_ratio": metrics.truth_ratio(paraphrased, false),
            "truth_ratio_arithmetic": metrics.truth_ratio(paraphrased, false, arithmetic=True),
            "truth_ratio_probability": metrics.truth_ratio_probability(paraphrased, false),
            "exact_memorisation": metrics.exact_memorisation(hits),
            "extraction_strength": _mean([metrics.extraction_strength(part.answer_hits) for part in self.answer]),
            "extraction_strength_floor": _mean(
                [metrics.extraction_strength_floor(part.answer_hits) for part in self.answer]
            ),
            "predictive_entropy": sum(part.entropy * part.tokens for part in self.answer) / tokens,
            "repetition": _mean([metrics.repetition(item.ids) for item in self.generations]),
            "token_entropy": _mean([metrics.token_entropy(item.ids) for item in self.generations]),
        }
        if self.record.is_text:
            pairs = list(zip(self.generations, self.references, strict=True))
            values["rougeL_recall"] = _mean([metrics.rougeL_recall(item.text, text) for item, text in pairs])
            values["exact_match"] = _mean([metrics.exact_match(item.text, [text]) for item, text in pairs])
        elif self.generations:
            said = self.generations[0].text
            words = metrics.rouge(said, self.references[0])
            values["rougeL_recall"], values["rougeL_f1"] = words.recall, words.f1
            values["rouge1_recall"] = metrics.rouge(said, self.references[0], "rouge1").recall
            values["refusal_rate"] = is_refusal(said)
            values["exact_match"] = metrics.exact_match(said, self.references)
        if self.asked_otherwise is not None:
            values["paraphrase_exact_match"] = metrics.exact_match(self.asked_otherwise.text, self.references)
        kept = {name: value for name, value in values.items() if math.isfinite(value)}
        return {"index": self.record.index} | kept | self._candidates() | self.more

    def _answer(self, name: str) -> NDArray[np.float64]:
        """Return an array over the answer's tokens, without answer tag and end of sequence, of all windows."""
        return np.concatenate([getattr(part, name)[part.answer] for part in self.answer])

    def _candidates(self) -> dict[str, float]:
        """Return mean NLL and token count of every other answer, as the official log format wants them."""
        found = {} if self.paraphrased is None else _size("paraphrased_{}", self.paraphrased)
        for place, part in enumerate(self.perturbed):
            found |= _size(f"perturbed_{{}}_{place}", part)
        return found


def _size(name: str, part: SequenceScore) -> dict[str, float]:
    return {name.format("nll"): part.mean_nll, name.format("tokens"): part.tokens}


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else float("nan")


@dataclass
class _Work:
    """What is still to be run: examples to score and prompts to continue, each with the place its result goes to."""

    examples: list[Example] = field(default_factory=list)
    scored: list[Callable[[SequenceScore], None]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    limits: list[int | None] = field(default_factory=list)
    sources: list[int | None] = field(default_factory=list)  # the example, if any, that begins with the prompt
    generated: list[Callable[[Generation], None]] = field(default_factory=list)
    longest_answer: int = 0

    def score(self, example: Example, place: Callable[[SequenceScore], None]) -> None:
        self.examples.append(example)
        self.scored.append(place)

    def ask(
        self,
        prompt: Sequence[int],
        place: Callable[[Generation], None],
        limit: int | None = None,
        source: int | None = None,
    ) -> None:
        self.sources.append(source)
        self.prompts.append(list(prompt))
        self.limits.append(limit)
        self.generated.append(place)


def measure(
    model: nn.Module,
    tokenizer: Any,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Record]],
    *,
    effort: Effort,
    progress: Progress | None = None,
) -> dict[str, list[Measured]]:
    """Measure the rows of several sets together, so that batches are full whatever the sets' sizes.

    `progress` is told, too, when a model does not take the fast way, and why: the numbers are the same, only later.
    Raises InputError before any work for rows that `check_measurable` refuses.
    """
    work, measured = _plan(model, tokenizer, encoder, sets, answers_only=effort.answers_only)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    total = len(work.examples) + len(work.prompts)
    done = 0

    def advance(count: int, note: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, note)

    reading = reading_of(model) if work.examples else Reading()
    note = "scoring" if reading.reason is None else f"scoring, the plain way: {reading.reason}"
    scores = score(
        model,
        work.examples,
        pad_id=pad_id,
        eos_ids=end_ids(model, tokenizer),
        batch_tokens=effort.batch_tokens,
        progress=lambda count: advance(count, note),
        reading=reading,
        cache=effort.cache,
    )
    for place, result in zip(work.scored, scores, strict=True):
        place(result)
    for name, rows in measured.items():
        check_scored([part for row in rows for part in row.answer], name)
    known = [
        [] if source is None else known_start(work.examples[source], scores[source].hits, len(prompt))
        for source, prompt in zip(work.sources, work.prompts, strict=True)
    ]
    answers = generate(
        model,
        tokenizer,
        work.prompts,
        max_length=effort.max_length,
        max_new_tokens=_new_tokens(work.limits, effort, work.longest_answer),
        batch_rows=effort.batch_rows,
        progress=lambda count: advance(count, "generating"),
        known=known,
        cache=effort.cache,
    )
    for put, answer in zip(work.generated, answers, strict=True):
        put(answer)
    return measured


def check_measurable(model: nn.Module, tokenizer: Any, encoder: Encoder, sets: Mapping[str, Sequence[Record]]) -> None:
    """Raise InputError when a row of one of the sets cannot be encoded, or is longer than what the model can read."""
    _plan(model, tokenizer, encoder, sets)


def answer_limit(model: nn.Module, tokenizer: Any, encoder: Encoder, sets: Mapping[str, Sequence[Record]]) -> int:
    """Return how many tokens an answer to these rows may have where `fit_answers` is the only limit."""
    return _fitted(_plan(model, tokenizer, encoder, sets)[0].longest_answer)


def _fitted(longest: int) -> int:
    return max(LEAST_NEW_TOKENS, 2 * longest + 8)


def _plan(
    model: nn.Module,
    tokenizer: Any,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Record]],
    *,
    answers_only: bool = False,
) -> tuple[_Work, dict[str, list[Measured]]]:
    """Encode everything that is to be scored or continued, and check that the model can read it."""
    work = _Work()
    measured = {
        name: [_plan_row(work, encoder, tokenizer, record, f"--{name}", answers_only) for record in records]
        for name, records in sets.items()
    }
    lengths = [*(len(example.input_ids) for example in work.examples), *(len(prompt) + 1 for prompt in work.prompts)]
    check_fits(model, tokenizer, max(lengths, default=0))
    return work, measured


def _new_tokens(limits: Sequence[int | None], effort: Effort, longest: int) -> list[int] | None:
    """Return how many tokens each prompt may be continued by, or None when only the total length is limited."""
    common = effort.max_new_tokens
    if common is None and effort.fit_answers:
        common = _fitted(longest)
    if common is None and effort.max_length is not None:
        common = effort.max_length
    if common is None:
        raise ValueError("measure got no limit for answers: give max_length, max_new_tokens or fit_answers")
    return [common if limit is None else min(limit, common) for limit in limits]


def _plan_row(
    work: _Work, encoder: Encoder, tokenizer: Any, record: Record, option: str, answers_only: bool
) -> Measured:
    """Put a row's work on the list; return the row."""
    examples = encoder.encode(record, option)
    if record.is_text:
        return _plan_text(work, examples, tokenizer, record)
    question, answer = question_and_answer(record)
    references = [answer] + ([record.paraphrased_answer] if record.paraphrased_answer is not None else [])
    row = Measured(record, question, references, examples=list(examples), prompts=[prompt_of(examples[0])])
    source = len(work.examples)
    for example in examples:
        work.score(example, row.answer.append)
    encoded = list(examples)
    if record.perturbed_answers:
        if record.paraphrased_answer is not None:
            encoded.append(encoder.encode_answer(record, record.paraphrased_answer, option=option))
        if not answers_only:
            for other in encoded[len(examples) :]:
                work.score(other, lambda found: setattr(row, "paraphrased", found))
            for false in record.perturbed_answers:
                work.score(encoder.encode_answer(record, false, option=option), row.perturbed.append)
    work.ask(row.prompts[0], row.generations.append, source=source)
    if record.paraphrased_question is not None and not record.messages and not answers_only:
        other = encoder.encode_answer(record, answer, record.paraphrased_question, option)
        work.ask(prompt_of(other), lambda found: setattr(row, "asked_otherwise", found))
    longest = max(len(example.input_ids) - len(prompt_of(example)) for example in encoded)
    work.longest_answer = max(work.longest_answer, longest)
    return row


def prompt_of(example: Example) -> list[int]:
    """Return what is continued: the ids before the answer; of a conversation, before its last assistant turn."""
    start = example.generation_length
    for place in range(start + 1, len(example.labels)):
        if example.labels[place] != IGNORE and example.labels[place - 1] == IGNORE:
            start = place
    return example.input_ids[: max(1, start)]


def _plan_text(work: _Work, examples: Sequence[Example], tokenizer: Any, record: Record) -> Measured:
    """Running text: every window is scored whole, and continued from its first half by at most 50 tokens."""
    references = []
    prompts = []
    for example in examples:
        half = max(1, len(example.input_ids) // 2)
        limit = max(1, min(TEXT_NEW_TOKENS, len(example.input_ids) - half))
        prompts.append((example.input_ids[:half], limit))
        rest = example.input_ids[half : half + limit]
        references.append(tokenizer.decode(rest, skip_special_tokens=True).strip())
    question = tokenizer.decode(prompts[0][0], skip_special_tokens=True).strip()
    row = Measured(record, question, references, examples=list(examples), prompts=[prompt for prompt, _ in prompts])
    for example, (prompt, limit) in zip(examples, prompts, strict=True):
        work.ask(prompt, row.generations.append, limit, source=len(work.examples))
        work.score(example, row.answer.append)
    return row


def question_and_answer(record: Record) -> tuple[str, str]:
    """Return what is asked and the right answer; of a conversation, the turns before the last assistant turn and it."""
    if not record.messages:
        return record.question or "", record.answer or ""
    place = max(
        (i for i, (role, _) in enumerate(record.messages) if role == "assistant"), default=len(record.messages) - 1
    )
    asked = "\n".join(content for role, content in record.messages[:place] if role != "system")
    return asked, record.messages[place][1]


def set_results(
    rows: Sequence[Measured], *, forget: bool = False, normalised: bool = False, seed: int = 42
) -> SetResults:
    """Return a set's results: means with bootstrap intervals over rows, and the rows' own numbers.

    `truth_ratio` is averaged as min(R, 1/R) on the forget set and as max(0, 1 - R) elsewhere, `truth_ratio_probability`
    as it is; `perplexity` is exp(Σ NLL / Σ tokens) over all rows.
    """
    return summarise([row.numbers(normalised=normalised) for row in rows], forget=forget, seed=seed)


def summarise(per_example: list[dict[str, float]], *, forget: bool = False, seed: int = 42) -> SetResults:
    """Return the results of a set that follow from the numbers of its rows; see `set_results`."""
    found: dict[str, Interval] = {}
    for name in dict.fromkeys(name for numbers in per_example for name in numbers):
        if name in ROW_ONLY or name.startswith(ROW_ONLY_PARTS):
            continue
        values = np.array([numbers[name] for numbers in per_example if name in numbers])
        if name in ("truth_ratio", "truth_ratio_arithmetic"):
            values = metrics.forget_truth_ratio(values) if forget else metrics.utility_truth_ratio(values)
        found[name] = metrics.bootstrap(values, seed=seed)
    tokens = np.array([numbers["tokens"] for numbers in per_example])
    nlls = np.array([numbers["nll"] for numbers in per_example]) * tokens
    found["perplexity"] = Interval(*metrics.perplexity(metrics.bootstrap(nlls, weights=tokens, seed=seed)).tolist())
    return SetResults(len(per_example), found, per_example)


def texts(name: str, rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the rows' texts for examples.jsonl; of running text, the first window."""
    return [
        {
            "set": name,
            "index": row.record.index,
            "question": row.question,
            "answer": row.references[0],
            "generation": row.generations[0].text,
        }
        for row in rows
    ]
