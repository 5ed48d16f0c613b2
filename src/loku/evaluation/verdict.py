"""The verdict: a level, a sentence, and what both rest on. It never claims more than its reference allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from loku.evaluation.reference import Reference
from loku.evaluation.results import Results

# Thresholds. The first is the usual one for forget quality (Maini et al. 2024); the others are our own, and coarse on
# purpose: a verdict should not turn on the second decimal.
KS_LEVEL = 0.05  # from this p-value on, the truth ratios are not told apart
UTILITY_KEPT = 0.9  # share of the target's utility that "indistinguishable" needs
UTILITY_COLLAPSED = 0.5  # below this share of it a model is damaged, whatever it forgot
SUPPRESSED_SHARE = 0.8  # share of the target's forget scores that suppressed ones stay below
SUPPRESSED_LEVEL = 0.5  # the same without a target: probability and ROUGE-L recall stay below
REPETITION_EXCESS = 0.2  # repeated 4-grams beyond the comparison model's that count as broken fluency
ENTROPY_SHARE = 0.5  # below this share of the comparison model's token entropy fluency counts as broken
FEW_ROWS = 100  # below this number of forget rows a KS test has little power

UTILITY_SETS = ("retain", "general", "real_authors", "world_facts")  # of suites own and tofu
NOT_MEASURED = "indistinguishability not measured"
SCORE_GAP = 0.05  # difference of a forget score from the reference's that may count as none
FORGET_SCORES = {"probability": "answer probability", "rougeL_recall": "ROUGE-L recall"}
MEMORISATION_SCORES = {"exact_memorisation": "exact memorisation", "extraction_strength": "extraction strength"}


@dataclass(frozen=True)
class Verdict:
    """What may be said about a model, in one word (or two), in sentences, and on which evidence."""

    level: str
    sentence: str
    rests_on: str

    def to_json(self) -> dict[str, str]:
        """Return the verdict as it stands in a results file."""
        return {"level": self.level, "sentence": self.sentence, "rests_on": self.rests_on}


def verdict(unlearned: Results, *, target: Results | None = None, reference: Reference | None = None) -> Verdict | None:
    """Judge an unlearned model against the retain-only reference, or against the target where there is none.

    With forget quality against a reference: "indistinguishable" (KS p >= 0.05, no forget score apart from the
    reference's, utility at least 90 % of the target's, or of the reference's where the target is unknown, and fluent
    answers), "distinguishable" or "damaged". Without one: "suppressed", whose sentence says that
    indistinguishability was not measured, "not suppressed" or "damaged". Damaged means that what had to stay did not:
    utility collapsed, or answers to retain questions are broken. Broken answers to forget questions alone make a
    removal visible, and the sentence says so. None when no forget set was measured.
    """
    if "forget" not in unlearned.sets:
        return None
    measured = reference is not None and "forget_quality" in unlearned.summary
    rests_on = _rests_on(target, reference, measured)
    harm = _damage(unlearned, target, reference)
    if harm:
        ending = "" if measured else f" {NOT_MEASURED.capitalize()}."
        return Verdict(
            "damaged",
            f"The model is damaged: {harm}. Low scores on the forget set say nothing about forgetting then.{ending}",
            rests_on,
        )
    broken = "; ".join(_stammer("forget", unlearned, target, reference))
    removal = f"the model shows the removal: {broken}" if broken else ""
    if measured and reference is not None:
        return _against_reference(unlearned, target, reference, removal, rests_on)
    found = _without_reference(unlearned, target, rests_on)
    return Verdict(found.level, found.sentence + _sentence(removal), rests_on)


def _sentence(clause: str) -> str:
    """Return a clause as a sentence that follows another one; nothing for nothing."""
    return f" {clause[0].upper()}{clause[1:]}." if clause else ""


def _against_reference(
    unlearned: Results, target: Results | None, reference: Reference, removal: str, rests_on: str
) -> Verdict:
    quality, rows = unlearned.summary["forget_quality"], int(unlearned.summary["forget_quality_rows"])
    name = f"the retain-only model '{reference.name}'"
    share, whose = _utility_share(unlearned, target, reference)
    if share is None:
        return Verdict(
            "undecided",
            f"Compared with {name}, but {_no_share(unlearned, target, reference)}, and forget quality without utility "
            f"says nothing: a broken model would pass too.{_sentence(removal)}",
            rests_on,
        )
    test = f"forget quality p = {quality:.2g} on {rows} forget rows, utility {share:.0%} of {whose}"
    few = f" {rows} rows are few: weak evidence." if rows < FEW_ROWS else ""
    apart = _apart(unlearned, reference)
    alike = f"The truth ratios on the forget set cannot be told from those of {name}"
    if quality < KS_LEVEL:
        told = f"The model can be told from {name} ({test}).{_side(apart)}{_sentence(removal)}"
        return Verdict("distinguishable", told, rests_on)
    if apart:
        scores = "; ".join(gap.told for gap in apart)
        told = f"{alike} ({test}), but other scores can: {scores}.{_side(apart)}{_sentence(removal)}{few}"
        return Verdict("distinguishable", told, rests_on)
    if share < UTILITY_KEPT:
        told = f"{alike}, but the model lost too much of what had to stay ({test}).{_sentence(removal)}{few}"
        return Verdict("distinguishable", told, rests_on)
    if removal:
        return Verdict("distinguishable", f"{alike} ({test}), but {removal}.{few}", rests_on)
    return Verdict(
        "indistinguishable", f"On the forget set the model cannot be told from {name} ({test}).{few}", rests_on
    )


class _Gap(NamedTuple):
    """A forget score whose interval lies apart from the reference's, on one side of it."""

    known: bool
    told: str


def _apart(unlearned: Results, reference: Reference) -> list[_Gap]:
    """Return the forget scores that tell the model from the reference: intervals apart, and not by a trifle."""
    if reference.results is None:
        return []
    gaps = []
    for metric, name in (FORGET_SCORES | MEMORISATION_SCORES).items():
        ours, theirs = (found.sets["forget"].metrics.get(metric) for found in (unlearned, reference.results))
        if ours is None or theirs is None or abs(ours.mean - theirs.mean) <= SCORE_GAP:
            continue
        if ours.low > theirs.high or ours.high < theirs.low:
            told = f"{name} {ours.mean:.2f} against {theirs.mean:.2f}"
            gaps.append(_Gap(ours.mean > theirs.mean, told))
    return gaps


def _side(gaps: list[_Gap]) -> str:
    """Say on which side of the reference the model lies, where the scores agree."""
    if gaps and all(gap.known for gap in gaps):
        return " It still knows more of the forget set than a model that never saw it."
    if gaps and not any(gap.known for gap in gaps):
        return " It knows less of the forget set than a model that never saw it, which betrays a removal."
    return ""


def _without_reference(unlearned: Results, target: Results | None, rests_on: str) -> Verdict:
    if target is None or "forget" not in target.sets:
        return _by_level(unlearned, rests_on)
    changes, fallen = [], []
    for metric, name in FORGET_SCORES.items():
        before, after = (results.sets["forget"].metrics.get(metric) for results in (target, unlearned))
        if before is not None and after is not None:
            changes.append(f"{name} {before.mean:.2f} before, {after.mean:.2f} after")
            fallen.append(after.high < before.low and after.mean <= SUPPRESSED_SHARE * before.mean)
    detail = "; ".join(changes) or "no common score"
    if fallen and all(fallen):
        return Verdict("suppressed", f"The forget set is suppressed; {NOT_MEASURED} ({detail}).", rests_on)
    return Verdict(
        "not suppressed",
        f"The forget set is not suppressed: its scores did not fall clearly below the target's ({detail}); "
        f"{NOT_MEASURED}.",
        rests_on,
    )


def _by_level(unlearned: Results, rests_on: str) -> Verdict:
    scores = {name: unlearned.mean("forget", metric) for metric, name in FORGET_SCORES.items()}
    known = {name: value for name, value in scores.items() if value is not None}
    detail = ", ".join(f"{name} {value:.2f}" for name, value in known.items()) or "no score"
    note = "The model before unlearning was not measured either, so this rests on the level of the scores alone."
    if known and all(value < SUPPRESSED_LEVEL for value in known.values()):
        return Verdict("suppressed", f"The forget set is suppressed; {NOT_MEASURED} ({detail}). {note}", rests_on)
    return Verdict(
        "not suppressed",
        f"The forget set is not suppressed: not every score lies below {SUPPRESSED_LEVEL} ({detail}); "
        f"{NOT_MEASURED}. {note}",
        rests_on,
    )


def _rests_on(target: Results | None, reference: Reference | None, measured: bool) -> str:
    parts = []
    if reference is not None:
        limit = "" if measured else "; for damage alone: forget quality needs perturbed answers on both sides"
        parts.append(f"the retain-only model '{reference.name}' (sha256 {reference.sha256[:12]}{limit})")
    if target is not None:
        parts.append(f"the target '{target.model.get('name')}' before unlearning")
    if reference is None:
        parts.append("no retain-only reference")
    return ", ".join(parts)


def _utility_share(unlearned: Results, target: Results | None, reference: Reference | None) -> tuple[float | None, str]:
    """Return the unlearned model's utility as a share of the target's, or else of the reference's.

    None where either was not measured; a utility of 0 has no shares.
    """
    ours = unlearned.summary.get("model_utility")
    for whose, theirs in _utilities(unlearned, target, reference).items():
        if ours is not None and theirs > 0:
            return ours / theirs, whose
    return None, ""


def _utilities(unlearned: Results, target: Results | None, reference: Reference | None) -> dict[str, float]:
    """Return the utilities of the same rows that were measured to compare with, the target's first."""
    owners: dict[str, tuple[Mapping[str, float], Results | None]] = {
        "the target's": (target.summary if target else {}, target),
        "the retain-only model's": (
            (reference.summary or {}, reference.results) if reference is not None else ({}, None)
        ),
    }
    return {
        whose: summary["model_utility"]
        for whose, (summary, results) in owners.items()
        if "model_utility" in summary and (results is None or _same_utility_rows(unlearned, results))
    }


def _same_utility_rows(one: Results, other: Results) -> bool:
    """Return whether the utilities of two results are means over the same rows, so far as their hashes are known."""
    if one.suite != other.suite:
        return False
    for name in UTILITY_SETS:
        if (name in one.sets) != (name in other.sets):
            return False
        (ours, theirs), rows = (found.data.get(name, {}).get("sha256") for found in (one, other)), (one, other)
        if None not in (ours, theirs) and ours != theirs:
            return False
        if name in one.sets and len({found.sets[name].rows for found in rows}) > 1:
            return False
    return True


def _no_share(unlearned: Results, target: Results | None, reference: Reference | None) -> str:
    """Say why there is no share of utility."""
    if "model_utility" not in unlearned.summary:
        return "utility was not measured (evaluate retain data as well)"
    compared = list(_utilities(unlearned, target, reference))
    if compared:
        return (
            f"there is no utility to compare with ({' and '.join(compared)} {'is' if len(compared) == 1 else 'are'} 0)"
        )
    if (target and "model_utility" in target.summary) or (reference and "model_utility" in (reference.summary or {})):
        return "utility was measured there on other rows (or sets) than here"
    return "utility was measured of neither the target nor the retain-only model"


def _damage(unlearned: Results, target: Results | None, reference: Reference | None) -> str:
    """Say what is broken of what had to stay, or return an empty string."""
    reasons = []
    share, whose = _utility_share(unlearned, target, reference)
    if share is not None and share < UTILITY_COLLAPSED:
        reasons.append(f"its utility is {share:.0%} of {whose}")
    return "; ".join(reasons + _stammer("retain", unlearned, target, reference))


def _stammer(name: str, unlearned: Results, target: Results | None, reference: Reference | None) -> list[str]:
    """Say how answers to one set's questions are broken, beside those of a healthy model."""
    healthy = (reference.results if reference else None) or target
    whom = "the retain-only model's" if reference and reference.results else "the target's"
    if healthy is None:
        return []
    reasons = []
    ours, theirs = unlearned.mean(name, "repetition"), healthy.mean(name, "repetition")
    if ours is not None and theirs is not None and ours > theirs + REPETITION_EXCESS:
        counts = f"{ours:.0%} of 4-grams, {theirs:.0%} in {whom}"
        reasons.append(f"its answers to the {name} questions repeat themselves ({counts})")
    ours, theirs = unlearned.mean(name, "token_entropy"), healthy.mean(name, "token_entropy")
    if ours is not None and theirs is not None and ours < ENTROPY_SHARE * theirs:
        bits = f"{ours:.1f} bits of token entropy, {theirs:.1f} in {whom}"
        reasons.append(f"its answers to the {name} questions are empty or monotonous ({bits})")
    return reasons
