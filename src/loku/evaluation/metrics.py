"""The metrics as pure functions of numbers and texts: they know nothing of models, files or suites."""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

EXPONENT_LIMIT = 700.0  # exp(700) is still a float64; a ratio beyond it carries no information and is no JSON


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


class ForgetQuality(NamedTuple):
    """Result of the two-sample Kolmogorov-Smirnov test; `rows` counts the first sample."""

    p: float
    statistic: float
    rows: int


def _exp(values: ArrayLike) -> Array:
    return np.exp(np.clip(np.asarray(values, dtype=np.float64), -EXPONENT_LIMIT, EXPONENT_LIMIT))


def probability(mean_nll: ArrayLike) -> Array:
    """Return exp(-mean negative log-likelihood per token): the geometric mean of an answer's token probabilities."""
    return _exp(-np.asarray(mean_nll, dtype=np.float64))


def perplexity(mean_nll: ArrayLike) -> Array:
    """Return exp(mean negative log-likelihood per token, in nats)."""
    return _exp(mean_nll)


def normalised_probability(true_nll: float, false_nlls: Sequence[float] | Array) -> float:
    """Return p / (p + Σ p_false) with p = exp(-mean NLL): TOFU's probability on real authors and world facts.

    Without false answers there is nothing to choose from: NaN.
    """
    if not len(false_nlls):
        return float("nan")
    return float(1.0 / (1.0 + np.sum(_exp(true_nll - np.asarray(false_nlls, dtype=np.float64)))))


def truth_ratio(paraphrased_nll: float, perturbed_nlls: Sequence[float] | Array, *, arithmetic: bool = False) -> float:
    """Return TOFU's truth ratio R: mean probability of the perturbed answers over that of the paraphrased one.

    Each p = exp(-mean NLL per token). The mean over perturbed answers is geometric, R = exp(ℓ_para - mean ℓ_pert), as
    in the published numbers, or arithmetic, R = mean(p_pert) / p_para, as in the paper's formula (Maini et al. 2024).
    Without perturbed answers R is NaN.
    """
    if not len(perturbed_nlls):
        return float("nan")
    nlls = np.asarray(perturbed_nlls, dtype=np.float64)
    if not arithmetic:
        return float(_exp(paraphrased_nll - nlls.mean()))
    least = nlls.min()  # taken out of the sum, so that no probability underflows
    return float(_exp(paraphrased_nll - least + np.log(np.mean(np.exp(least - nlls)))))


def truth_ratio_probability(paraphrased_nll: float, perturbed_nlls: Sequence[float] | Array) -> float:
    """Return p / (p + p_false), the form of the truth ratio that open-unlearning's aggregate is made of.

    p = exp(-mean NLL) of the paraphrased answer, p_false the geometric mean of the perturbed ones: 1 / (1 + R) with
    TOFU's geometric R. Between 0 and 1, higher means more knowledge; the set's value is the plain mean. Without
    perturbed answers NaN.
    """
    return 1.0 / (1.0 + truth_ratio(paraphrased_nll, perturbed_nlls))


def forget_truth_ratio(ratios: ArrayLike) -> Array:
    """Return min(R, 1/R), what TOFU averages over the forget set: 1 when true and false answers are equally likely."""
    values = np.asarray(ratios, dtype=np.float64)
    return np.minimum(values, 1.0 / values)


def utility_truth_ratio(ratios: ArrayLike) -> Array:
    """Return max(0, 1 - R), what TOFU averages over every other set: 1 when false answers are impossible."""
    return np.maximum(0.0, 1.0 - np.asarray(ratios, dtype=np.float64))


class Rouge(NamedTuple):
    """Precision, recall and F1 of common words (ROUGE-1) or of the longest common subsequence of words (ROUGE-L)."""

    precision: float
    recall: float
    f1: float


@cache
def _rouge_scorer(kind: str, stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    return RougeScorer([kind], use_stemmer=stemmer)


def rouge(generation: str, reference: str, kind: str = "rougeL", *, stemmer: bool = True) -> Rouge:
    """Return ROUGE of a generation against a reference; `kind` is "rouge1" or "rougeL".

    The numbers are rouge-score's. An empty generation or reference scores 0.
    """
    found = _rouge_scorer(kind, stemmer).score(reference, generation)[kind]
    return Rouge(float(found.precision), float(found.recall), float(found.fmeasure))


def rougeL_recall(generation: str, reference: str) -> float:  # noqa: N802 - the metric's name
    """Return ROUGE-L recall with Porter stemming, |longest common subsequence of words| / |words of the reference|.

    An empty generation or reference scores 0.
    """
    return rouge(generation, reference).recall


def normalise(text: str) -> str:
    """Return a text in lower case with punctuation as single blanks: what `exact_match` compares."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text).split())


def exact_match(generation: str, references: Iterable[str]) -> float:
    """Return 1 when the generation equals one of the references up to case, punctuation and blanks, else 0."""
    text = normalise(generation)
    return float(bool(text) and any(text == normalise(reference) for reference in references))


def exact_memorisation(hits: ArrayLike) -> float:
    """Return the share of answer tokens that greedy decoding predicts from the true beginning (teacher-forced).

    `hits` holds one truth value per answer token, without the end of sequence. NaN without any.
    """
    values = np.asarray(hits, dtype=bool)
    return float(values.mean()) if values.size else float("nan")


def extraction_strength(hits: ArrayLike) -> float:
    """Return 1 - k/L, with k the least cut such that all of the L answer tokens from k on are predicted.

    0 when the last token is missed (some implementations return 1/L there), 1 when all are hit, NaN without any token.
    """
    values = np.asarray(hits, dtype=bool)
    if not values.size:
        return float("nan")
    misses = np.flatnonzero(~values)
    cut = int(misses[-1]) + 1 if misses.size else 0
    return 1.0 - cut / values.size


def extraction_strength_floor(hits: ArrayLike) -> float:
    """Return open-unlearning's variant of `extraction_strength`, which never falls below 1/L.

    Its search for the cut k ends at L - 1, whether or not the last token is hit: 1/L where nothing matches, and so 1
    for a missed answer of one token. Only for comparison with numbers of that framework. NaN without any token.
    """
    values = np.asarray(hits, dtype=bool)
    return max(extraction_strength(values), 1.0 / values.size) if values.size else float("nan")


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return 1 - distinct n-grams / n-grams: 0 without repetition, 0 also for texts shorter than n."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def token_entropy(tokens: Sequence[Hashable]) -> float:
    """Return the entropy, in bits, of a text's own token frequencies: 0 when empty or a single token over and over."""
    if not tokens:
        return 0.0
    shares = np.array(list(Counter(tokens).values()), dtype=np.float64) / len(tokens)
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def harmonic_mean(values: Iterable[float]) -> float:
    """Return the harmonic mean of non-negative values; 0 as soon as one of them is 0.

    Raises ValueError without values or with a negative one.
    """
    numbers = [float(value) for value in values]
    if not numbers or min(numbers) < 0:
        raise ValueError(f"harmonic_mean got {numbers}: it needs one or more non-negative values")
    if min(numbers) == 0:
        return 0.0
    return len(numbers) / sum(1.0 / number for number in numbers)


def forget_quality(ratios: ArrayLike, reference_ratios: ArrayLike) -> ForgetQuality:
    """Return TOFU's forget quality: do a model's truth ratios on the forget set look like a retain-only model's?

    p is that of the two-sided two-sample Kolmogorov-Smirnov test.
    The distribution of the statistic is exact up to 10,000 rows. p is discrete, its power grows with the number of
    rows, and a broken model can score well: never read it without utility beside it.
    """
    from scipy.stats import ks_2samp

    sample = np.asarray(ratios, dtype=np.float64)
    with warnings.catch_warnings():
        # For nearly equal samples scipy 1.17 rounds an exact p of 1 to just above 1, calls that a failure, and warns
        # that it takes the asymptotic p, which is 1 there too.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation unsuccessful", category=RuntimeWarning)
        result = ks_2samp(sample, np.asarray(reference_ratios, dtype=np.float64), method="auto")
    return ForgetQuality(float(result.pvalue), float(result.statistic), int(sample.size))


def bootstrap(
    values: ArrayLike, *, weights: ArrayLike | None = None, seed: int = 42, resamples: int = 1000
) -> Interval:
    """Return the mean and its seeded 95 % percentile-bootstrap interval over rows.

    With `weights` the mean is Σ values / Σ weights, a ratio of sums. The interval of one row is that row. Raises
    ValueError without rows.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        raise ValueError("bootstrap got no rows: it needs at least one")
    sizes = np.ones_like(sample) if weights is None else np.asarray(weights, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, sample.size, size=(resamples, sample.size))
    means = sample[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(sample.sum() / sizes.sum())
    # Rounding may leave equal rows an ulp apart from their own mean: the interval holds the mean.
    return Interval(mean, min(float(low), mean), max(float(high), mean))
