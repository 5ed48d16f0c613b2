"""Slow, obvious float64 losses: loops over rows and positions, straight from the formulas."""

from __future__ import annotations

import math

import torch


def positions(logits, labels):
    """Yield (row, distribution as a float64 vector, gold token) for each supervised position."""
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                yield b, torch.softmax(logits[b, t - 1].double(), dim=0), int(labels[b, t])


def ihl(logits, labels):
    terms = []
    for _, p, y in positions(logits, labels):
        others = [p[v] for v in range(len(p)) if v != y]
        terms.append(1 + p[y] - torch.stack(others).max())
    return sum(terms) / len(terms)


def grad_ascent(logits, labels):
    terms = [torch.log(p[y]) for _, p, y in positions(logits, labels)]
    return sum(terms) / len(terms)


def nll(logits, labels):
    return -grad_ascent(logits, labels)


def npo(logits, labels, reference, beta):
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(labels.shape[0])]
    for b, p, y in positions(logits, labels):
        totals[b] = totals[b] + torch.log(p[y])
    terms = [
        -(2 / beta) * torch.log(1 / (1 + torch.exp(beta * (total - ref.double()))))
        for total, ref in zip(totals, reference, strict=True)
    ]
    return sum(terms) / len(terms)


def ihl_gradient(logits, labels):
    """The closed form of methods: p_y (1 - p_y + p_v) on y, -p_v (1 + p_y - p_v) on v, p_k (p_v - p_y) elsewhere."""
    gradient = torch.zeros_like(logits, dtype=torch.float64)
    count = sum(1 for _ in positions(logits, labels))
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            y = int(labels[b, t])
            if y == -100:
                continue
            p = torch.softmax(logits[b, t - 1].double(), dim=0)
            v = max((k for k in range(len(p)) if k != y), key=lambda k: float(p[k]))
            g = p * (p[v] - p[y])
            g[y] = p[y] * (1 - p[y] + p[v])
            g[v] = -p[v] * (1 + p[y] - p[v])
            gradient[b, t - 1] = g / count
    assert math.isfinite(float(gradient.sum()))
    return gradient
