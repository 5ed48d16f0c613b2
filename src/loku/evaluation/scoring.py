"""One teacher-forced pass: what a model makes of every supervised token, each sequence visited once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.errors import DivergenceError, InputError
from loku.evaluation.cache import BatchCache
from loku.evaluation.modes import evaluating
from loku.evaluation.passes import Reading, Statistics, reading_of, tree_statistics
from loku.evaluation.sharing import gathered, own_share
from loku.evaluation.token_tree import Tree, grow_trees

BATCH_TOKENS = 8192  # padded tokens per forward pass
BATCH_TOKENS_CPU = 2048  # and at most so many on CPU, where larger batches are slower: their states leave the cache
LEAST_LENGTH = 0.7  # of the longest row of a batch
END_TOKENS = 2  # an end of sequence is searched among this many last tokens: some chat templates put a newline after it


@dataclass(frozen=True)
class SequenceScore:
    """What a model makes of one example's supervised tokens, in their order.

    `nll` is their summed negative log-likelihood and `logprobs` its parts, in nats; `hits` says which tokens are the
    model's first choice; `entropy` is the mean entropy of the predicted distributions, in nats. `means` and `variances`
    are those of log p under the model's own distribution at each position, in nats and nats². The answer proper is the
    supervised tokens from `answer_start` to `answer_stop`: without an answer tag and without the end of sequence.
    """

    index: int
    tokens: int
    nll: float
    hits: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    entropy: float
    answer_start: int = 0
    answer_stop: int | None = None
    means: NDArray[np.float32] | None = None
    variances: NDArray[np.float32] | None = None

    @property
    def mean_nll(self) -> float:
        """Negative log-likelihood per token, in nats; answer tag and end of sequence count, as in TOFU."""
        return self.nll / self.tokens

    @property
    def answer_hits(self) -> NDArray[np.bool_]:
        """The hits of the answer proper."""
        return self.hits[self.answer]

    @property
    def answer(self) -> slice:
        """Where the answer proper lies among the supervised tokens."""
        return slice(self.answer_start, self.answer_stop)


def score(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    eos_ids: Collection[int] = (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    reading: Reading | None = None,
    cache: BatchCache | None = None,
) -> list[SequenceScore]:
    """Score examples under a model and return the scores in the examples' order.

    Sequences that begin alike are merged into token trees (`token_tree`), rows are sorted by length and batched up to
    `batch_tokens` padded tokens (on CPU 2048 at most), and logits are made at supervised positions only, a block at a
    time. How depends on what the model allows (`reading_of`, by default asked here); the scores do not, but for
    rounding. The model is in eval mode meanwhile and back in its own mode afterwards.

    Batches that `cache` holds are not computed again. Where torch.distributed is initialised, the processes share the
    batches and all of them return all scores. `progress` is told how many examples each batch finished. Raises
    InputError when an example has no supervised token.
    """
    for example in examples:
        if all(label == IGNORE for label in example.labels[1:]):
            raise InputError(
                f"Row {example.index} has no supervised token to score.",
                "Give every row an answer, or raise the length limit that cuts it off.",
            )
    if reading is None:
        reading = reading_of(model) if examples else Reading()
    if next(model.parameters()).device.type == "cpu":
        batch_tokens = min(batch_tokens, BATCH_TOKENS_CPU)
    trees = grow_trees([predicting_ids(example) for example in examples], reading.trees)
    found: dict[int, Statistics] = {}
    with torch.no_grad(), evaluating(model):
        for batch in own_share(_tree_batches(trees, batch_tokens)):
            members = [member for tree in batch for member in tree.members]
            chosen = [examples[member] for member in members]
            statistics = None if cache is None else cache.scores(chosen)
            if statistics is None:
                statistics = tree_statistics(model, reading.head, batch, examples, pad_id)
                if cache is not None:
                    cache.put_scores(chosen, statistics)
            found |= zip(members, statistics, strict=True)
            if progress is not None:
                progress(len(members))
    own = len(found)
    found = gathered(found)
    if progress is not None and len(found) > own:
        progress(len(found) - own)
    return [_score(example, found[place], eos_ids) for place, example in enumerate(examples)]


def check_scored(scores: Sequence[SequenceScore], what: str) -> None:
    """Raise DivergenceError where a likelihood is not a number: such a model says nothing about what it knows."""
    for found in scores:
        if not math.isfinite(found.nll):
            raise DivergenceError(
                f"The likelihood of {what} row {found.index} is not finite ({found.nll}).",
                "The model has diverged, or overflows in its type: measure another checkpoint, or try --dtype float32.",
            )


def predicting_ids(example: Example) -> list[int]:
    """Return the ids that have to be read: those before the last supervised one, which is only predicted."""
    last = max(place for place, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:last]


def _tree_batches(trees: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Return batches of similar length. Chains are kept apart: they need no mask of their own."""
    batches = []
    for chosen in ([tree for tree in trees if not tree.is_chain], [tree for tree in trees if tree.is_chain]):
        batches += [[chosen[row] for row in rows] for rows in length_batches(list(map(len, chosen)), batch_tokens)]
    return batches


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return positions in batches, longest first, of at most `batch_tokens` padded tokens (or one position).

    A batch holds nothing much shorter than its longest: it would be mostly padding.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        longest = lengths[batches[-1][0]] if batches else 0
        full = not batches or (len(batches[-1]) + 1) * longest > batch_tokens
        if full or lengths[position] < LEAST_LENGTH * longest:
            batches.append([])
        batches[-1].append(position)
    return batches


def _score(example: Example, found: Statistics, eos_ids: Collection[int]) -> SequenceScore:
    first, last = _answer_bounds(example, eos_ids)
    return SequenceScore(
        index=example.index,
        tokens=len(found.logprobs),
        nll=-float(found.logprobs.sum(dtype=np.float64)),
        hits=found.hits,
        logprobs=found.logprobs.astype(np.float32),
        entropy=-float(found.means.mean(dtype=np.float64)),
        answer_start=first,
        answer_stop=last,
        means=found.means.astype(np.float32),
        variances=found.variances.astype(np.float32),
    )


def _answer_bounds(example: Example, eos_ids: Collection[int]) -> tuple[int, int]:
    """Return where the answer proper starts and stops among the supervised tokens."""
    positions = [position for position, label in enumerate(example.labels) if position and label != IGNORE]
    stop = len(positions)
    for place in range(len(positions) - 1, max(-1, len(positions) - 1 - END_TOKENS), -1):
        if example.labels[positions[place]] in eos_ids:
            stop = place
            break
    start = sum(position < example.generation_length for position in positions)
    return (start, stop) if start < stop else (0, stop)
