"""What the benchmark suites share: plain texts continued as they are, and plain texts scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.records import Record
from loku.evaluation.cache import BatchCache
from loku.evaluation.generation import BATCH_ROWS, generate
from loku.evaluation.judging import judged
from loku.evaluation.measuring import Measured, Progress
from loku.evaluation.metrics import bootstrap
from loku.evaluation.results import SetResults
from loku.evaluation.scoring import BATCH_TOKENS, check_scored, score
from loku.models import check_fits


def encode_text(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return a text's ids, with the special tokens that the tokenizer puts before it, without an end of sequence."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()
    return ids


def continue_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    special: bool = True,
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return greedy continuations of texts, not stripped and without special tokens.

    Raises InputError when a prompt is longer than what the model reads.
    """
    ids = [encode_text(tokenizer, prompt, special=special) for prompt in prompts]
    check_fits(model, tokenizer, max(map(len, ids), default=0))
    found = generate(model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_rows=batch_rows, progress=progress)
    return [tokenizer.decode(list(answer.ids), skip_special_tokens=True) for answer in found]


class Probe(NamedTuple):
    """A text to continue by at most `limit` tokens, what makes numbers of the continuation, and what that rests on.

    `key` names the judgement and the reference answer: with another key a cached judgement is not found.
    """

    prompt: str
    judge: Callable[[str], dict[str, float]]
    key: str
    limit: int


def ask(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Probe]],
    names: Sequence[str],
    *,
    keep_text: bool = False,
    special: bool = True,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
    cache: BatchCache | None = None,
) -> dict[str, tuple[list[dict[str, float]], list[str]]]:
    """Continue the probes of all sets together, greedily, and judge each continuation.

    Returns each set's numbers (under some of `names`), and its texts, as decoded, with `keep_text` only. `cache` keeps
    continuations with `keep_text`, and numbers without. Raises InputError when a prompt is longer than what the model
    reads.
    """
    probes = [probe for found in sets.values() for probe in found]
    ids = [encode_text(tokenizer, probe.prompt, special=special) for probe in probes]
    check_fits(model, tokenizer, max(map(len, ids), default=0))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(probes), "generating")

    def decoded(said: Sequence[int]) -> str:
        return str(tokenizer.decode(list(said), skip_special_tokens=True))

    limits = [probe.limit for probe in probes]
    texts: list[str] = []
    if keep_text:
        answers = generate(
            model,
            tokenizer,
            ids,
            max_new_tokens=limits,
            batch_rows=batch_rows,
            progress=advance,
            cache=cache,
        )
        texts = [decoded(answer.ids) for answer in answers]
        numbers = [probe.judge(text) for probe, text in zip(probes, texts, strict=True)]
    else:
        numbers = judged(
            model,
            tokenizer,
            ids,
            lambda row, said: probes[row].judge(decoded(said)),
            names=names,
            keys=[probe.key for probe in probes],
            max_new_tokens=limits,
            batch_rows=batch_rows,
            progress=advance,
            cache=cache,
        )
    found, start = {}, 0
    for name, own in sets.items():
        found[name] = numbers[start : start + len(own)], texts[start : start + len(own)]
        start += len(own)
    return found


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    cache: BatchCache | None = None,
) -> list[dict[str, float]]:
    """Return the numbers of texts scored whole, in windows of at most `max_length` tokens where they are longer."""
    encoder = Encoder(tokenizer, TagTemplate(), max_length=max_length)
    records = [Record(index, text=text) for index, text in enumerate(texts)]
    windows = [encoder.encode(record) for record in records]
    check_fits(model, tokenizer, max((len(window.input_ids) for own in windows for window in own), default=0))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    examples = [window for own in windows for window in own]
    found = score(model, examples, pad_id=pad_id, batch_tokens=batch_tokens, cache=cache)
    check_scored(found, "the text of")
    scores = iter(found)
    pairs = zip(records, windows, strict=True)
    return [Measured(record, "", [], answer=[next(scores) for _ in own]).numbers() for record, own in pairs]


def plain_set(rows: Sequence[Mapping[str, float]], metrics: Iterable[str], seed: int) -> SetResults:
    """Return a set whose metrics are the means, with intervals, of the named numbers over the rows that have them."""
    found = {}
    for name in metrics:
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = bootstrap(values, seed=seed)
    return SetResults(len(rows), found, [dict(row) for row in rows])


def example_text(name: str, index: int, question: str, answer: str, generation: str) -> dict[str, Any]:
    """Return a row of examples.jsonl."""
    return {"set": name, "index": index, "question": question, "answer": answer, "generation": generation.strip()}
