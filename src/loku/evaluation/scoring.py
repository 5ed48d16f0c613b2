"""One teacher-forced pass: the log-probability of every supervised token, and whether greedy decoding hits it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Example
from loku.errors import InputError
from loku.evaluation.modes import evaluating

BATCH_TOKENS = 8192  # padded tokens per forward pass
SOFTMAX_ELEMENTS = 2**26  # logits widened to float32 at a time (256 MiB)
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
) -> list[SequenceScore]:
    """Score examples under a model and return the scores in the examples' order.

    Examples are sorted by length and batched up to `batch_tokens` padded tokens; the model is in eval mode meanwhile
    and back in its own mode afterwards. Only supervised positions are widened to float32. `progress` is told how many
    examples each batch finished. Raises InputError when an example has no supervised token.
    """
    for example in examples:
        if all(label == IGNORE for label in example.labels[1:]):
            raise InputError(
                f"Row {example.index} has no supervised token to score.",
                "Give every row an answer, or raise the length limit that cuts it off.",
            )
    device = next(model.parameters()).device
    scores: dict[int, SequenceScore] = {}
    with torch.no_grad(), evaluating(model):
        for batch in length_batches([len(example.input_ids) for example in examples], batch_tokens):
            chosen = [examples[position] for position in batch]
            inputs = {key: value.to(device) for key, value in pad_batch(chosen, pad_id).items()}
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits
            scores |= zip(batch, _scores(logits, labels, chosen, eos_ids), strict=True)
            if progress is not None:
                progress(len(batch))
    return [scores[position] for position in range(len(examples))]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return positions in batches, longest first, of at most `batch_tokens` padded tokens (or one position)."""
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(position)
    return batches


def _scores(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    examples: Sequence[Example],
    eos_ids: Collection[int],
) -> list[SequenceScore]:
    targets = labels[:, 1:].to(logits.device)
    mask = targets != IGNORE
    logprobs, hits, entropies, variances = _token_scores(logits[:, :-1][mask], targets[mask])
    scores = []
    start = 0
    for example, count in zip(examples, mask.sum(dim=1).tolist(), strict=True):
        part = slice(start, start + count)
        first, last = _answer_bounds(example, eos_ids)
        scores.append(
            SequenceScore(
                index=example.index,
                tokens=count,
                nll=-float(logprobs[part].sum(dtype=np.float64)),
                hits=hits[part],
                logprobs=logprobs[part],
                entropy=float(entropies[part].mean(dtype=np.float64)),
                answer_start=first,
                answer_stop=last,
                means=-entropies[part],
                variances=variances[part],
            )
        )
        start += count
    return scores


def _token_scores(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return log p(target), whether the target is the first choice, entropy, and variance of log p, by position."""
    rows = max(1, SOFTMAX_ELEMENTS // logits.shape[-1])
    logprobs, hits, entropies, variances = [], [], [], []
    for piece, target in zip(logits.split(rows), targets.split(rows), strict=True):
        distribution = piece.float().log_softmax(dim=-1)
        logprobs.append(distribution.gather(1, target.unsqueeze(1)).squeeze(1))
        hits.append(distribution.argmax(dim=-1) == target)
        shares = distribution.exp()
        entropies.append(torch.special.entr(shares).sum(dim=-1))
        deviations = (distribution + entropies[-1].unsqueeze(1)).square_()
        # Impossible tokens (log p of minus infinity) have no share in the variance.
        variances.append((shares * deviations).nan_to_num_(nan=0.0, posinf=0.0).sum(dim=-1))
    return tuple(torch.cat(parts).cpu().numpy() for parts in (logprobs, hits, entropies, variances))  # type: ignore[return-value]


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
