"""Slow, obvious float64 token scores: a loop over positions and over the vocabulary, straight from the formulas."""

from __future__ import annotations

import torch

FIELDS = ("target", "runner_up", "spread", "mean_logit", "expected_other")
EXTRAS = ("mean_logit", "expected_other")


def scores(logits, labels):
    """Return a dict of lists of scalars, one per supervised position, in the order of the batch."""
    result = {name: [] for name in FIELDS}
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            y = int(labels[b, t])
            if y == -100:
                continue
            z = logits[b, t - 1].double()
            others = [v for v in range(len(z)) if v != y]
            m = max(others, key=lambda v: float(z[v].detach()))
            total = sum(torch.exp(z[v] - z[m]) for v in others)
            q = {v: float(torch.exp(z[v] - z[m]).detach() / total.detach()) for v in others}
            result["target"].append(z[y])
            result["runner_up"].append(z[m])
            result["spread"].append(torch.log(total))
            result["mean_logit"].append(sum(z) / len(z))
            result["expected_other"].append(sum(q[v] * z[v] for v in others))
    return {name: torch.stack(values) for name, values in result.items()}


def head_logits(hidden, weight, bias=None, softcap=None):
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)
