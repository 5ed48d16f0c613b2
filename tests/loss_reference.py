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


def ihl(logits, labels, stop=0.0, beta=0.0):
    terms = []
    for _, p, y in positions(logits, labels):
        runner_up = torch.stack([p[v] for v in range(len(p)) if v != y]).max()
        weight = p[y].detach() ** beta
        terms.append(weight * (1 + p[y] - (runner_up.detach() if p[y] < stop else runner_up)))
    return sum(terms) / len(terms)


def grad_ascent(logits, labels):
    terms = [torch.log(p[y]) for _, p, y in positions(logits, labels)]
    return sum(terms) / len(terms)


def nll(logits, labels):
    return -grad_ascent(logits, labels)


def sums(logits, labels):
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(labels.shape[0])]
    for b, p, y in positions(logits, labels):
        totals[b] = totals[b] + torch.log(p[y])
    return totals


def lengths(labels):
    return [sum(int(label) != -100 for label in row[1:]) for row in labels]


def log_sigmoid(x):
    return torch.log(1 / (1 + torch.exp(-x)))


def npo(logits, labels, reference, beta):
    pairs = zip(sums(logits, labels), reference, strict=True)
    terms = [-(2 / beta) * log_sigmoid(-beta * (total - ref.double())) for total, ref in pairs]
    return sum(terms) / len(terms)


def simnpo(logits, labels, beta, delta):
    pairs = zip(sums(logits, labels), lengths(labels), strict=True)
    terms = [-(2 / beta) * log_sigmoid(-beta * (total / max(n, 1e-6) + delta)) for total, n in pairs]
    return sum(terms) / len(terms)


def dpo(logits, labels, reference, other_logits, other_labels, other_reference, beta):
    rows = zip(sums(logits, labels), reference, sums(other_logits, other_labels), other_reference, strict=True)
    terms = [
        -(2 / beta) * log_sigmoid(beta * ((other - other_ref.double()) - (total - ref.double())))
        for total, ref, other, other_ref in rows
    ]
    return sum(terms) / len(terms)


def answer_preservation(logits, labels, other_logits, other_labels, beta):
    rows = zip(sums(logits, labels), sums(other_logits, other_labels), strict=True)
    terms = [-(1 / beta) * log_sigmoid(beta * (total - other)) for total, other in rows]
    return sum(terms) / len(terms)


def wga(logits, labels, beta):
    terms = [p[y].detach() ** beta * torch.log(p[y]) for _, p, y in positions(logits, labels)]
    return sum(terms) / len(terms)


def satimp(logits, labels, beta1, beta2):
    terms = [
        p[y].detach() ** beta1 * (1 - p[y].detach()) ** beta2 * torch.log(p[y]) for _, p, y in positions(logits, labels)
    ]
    return sum(terms) / len(terms)


def ce_u(logits, labels, skip_first):
    terms, seen = [], set()
    for b, p, y in positions(logits, labels):
        others = [v for v in range(len(p)) if v != y]
        rest = sum(p[v].detach() for v in others)
        value = -sum(p[v].detach() / rest * torch.log(p[v]) for v in others)
        terms.append(value * 0 if skip_first and b not in seen else value)
        seen.add(b)
    return sum(terms) / len(terms)


def max_entropy(logits, labels):
    terms = [sum(-math.log(len(p)) - torch.log(q) for q in p) / len(p) for _, p, _ in positions(logits, labels)]
    return sum(terms) / len(terms)


def raw(logits, labels):
    """Yield (float64 logits, gold token) for each supervised position."""
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                yield logits[b, t - 1].double(), int(labels[b, t])


def pdu(logits, labels):
    terms = [(z.max() - z.mean()) ** 2 for z, _ in raw(logits, labels)]
    return sum(terms) / len(terms)


def undial(logits, labels, teacher_logits, beta):
    terms = []
    pairs = zip(raw(logits, labels), raw(teacher_logits, labels), strict=True)
    for (z, y), (teacher, _) in pairs:
        lowered = teacher.clone()
        lowered[y] -= beta
        target, p = torch.softmax(lowered, 0), torch.softmax(z, 0)
        terms.append(-sum(t * torch.log(q) for t, q in zip(target, p, strict=True)))
    return sum(terms) / len(terms)


def kl(logits, labels, teacher_logits):
    terms = []
    pairs = zip(positions(logits, labels), positions(teacher_logits, labels), strict=True)
    for (_, p, _), (_, q, _) in pairs:
        terms.append(sum(b * (torch.log(b) - torch.log(a)) for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


def idk(logits, labels):
    return nll(logits, labels)


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
