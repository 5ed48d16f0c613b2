"""Membership: the whole family of attacks on one model, and on three side by side.

Judged by the distance to the retain-only model's AUC, not to 0.5: forget and holdout rows need not be alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loku.attacks.robustness import Score, auc_score
from loku.data.encoding import Encoder
from loku.data.records import Record
from loku.evaluation.gradients import gradient_norms
from loku.evaluation.measuring import Measured, question_and_answer
from loku.evaluation.membership import ATTACKS, REFERENCE_ATTACK
from loku.evaluation.modes import end_ids
from loku.evaluation.scoring import score

Rows = Sequence[Mapping[str, float]]
NUMBERS = tuple(ATTACKS.values())


def member_numbers(model: nn.Module, tokenizer: Any, encoder: Encoder, records: Sequence[Record]) -> list[dict]:
    """Return every attack's score of each row (low for a likely member), and `nll`; gradient norms included.

    One scoring pass, and a backward pass per sequence. Windows of a long text are averaged.
    """
    examples = [encoder.encode(record) for record in records]
    flat = [example for own in examples for example in own]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = score(model, flat, pad_id=pad_id, eos_ids=end_ids(model, tokenizer))
    norms = gradient_norms(model, flat, [item.answer for item in found])
    scores, rows = iter(zip(found, norms, strict=True)), []
    for record, own in zip(records, examples, strict=True):
        parts = [next(scores) for _ in own]
        _, answer = question_and_answer(record)
        measured = Measured(record, "", [] if record.is_text else [answer], answer=[part for part, _ in parts])
        measured.more["gradient_norm"] = sum(norm for _, norm in parts) / len(parts)
        numbers = measured.numbers()
        rows.append({"index": record.index} | {name: numbers[name] for name in NUMBERS if name in numbers})
    return rows


def membership_scores(
    members: Mapping[str, Rows], others: Mapping[str, Rows], *, seed: int = 42
) -> dict[str, tuple[Score, dict[str, float]]]:
    """Return, for every attack, its score (`auc_score`) and the AUC of each role.

    Both mappings hold rows by role: target, unlearned, retain_only, the same rows in the same order. The reference
    attack takes the retain-only model's mean NLL as reference; of that model itself its AUC is 0.5.
    """
    roles = ("target", "unlearned", "retain_only")
    found = {}
    attacks = {**ATTACKS, REFERENCE_ATTACK: "nll"}
    for attack, number in attacks.items():
        if not all(number in row for side in (members, others) for role in roles for row in side[role]):
            continue
        columns = []
        for side in (members, others):
            base = [row[number] if attack == REFERENCE_ATTACK else 0.0 for row in side["retain_only"]]
            columns.append([[row[number] - less for row, less in zip(side[role], base, strict=True)] for role in roles])
        score_, aucs = auc_score(*columns, seed=seed)
        found[attack] = (score_, dict(zip(roles, aucs, strict=True)))
    return found
