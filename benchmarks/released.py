"""The released LoKU way of unlearning, written from its description; what the benchmarks compare with.

Rows padded to 500 tokens; importance from squares of batch means with every parameter's gradient, moved to host memory
every step; FILA's sketch of exactly r vectors, its residual written into the base weights; forget and retain batches
forwarded one after the other with the model's own loss and logits at every position, IHL by a softmax over the
vocabulary and a one-hot mask; a second model for references; answers scored padded to 200 tokens with all logits, and
generated from scratch. Its Trainer is a plain loop here, in its favour.

Two liberties, so that losses can be compared to rounding: means are taken over the tokens of a step, not of each
micro-batch, and KL looks at answer tokens only. Neither changes what is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from importance import released as squares_of_batch_means
from peft import LoraConfig, get_peft_model
from torch import Tensor

from loku.adapters.initialisers import Factors, fila_official
from loku.adapters.layers import target_layers
from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Example

LENGTH = 500
EPS = 1e-5
MICRO_BATCH = 2  # with 16 accumulated, in the released scripts

Pair = tuple[Example, Example]


def padded(examples: Sequence[Example], pad_id: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Return a batch padded to a fixed length."""
    batch = pad_batch(examples, pad_id)
    more = length - batch["input_ids"].shape[1]
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}
    return {name: F.pad(value, (0, more), value=fill[name]) for name, value in batch.items()}


def importance(model: Any, forget: list[Example], retain: list[Example]) -> dict[str, Tensor]:
    """Return each row's relative importance, sum_j F_f / (F_r + 1e-5)."""
    layers = target_layers(model)
    f, r = (squares_of_batch_means(model, layers, rows) for rows in (forget, retain))
    return {name: (f[name] / (r[name] + EPS)).sum(1) for name in layers}


def initial_factors(model: Any, rows: Mapping[str, Tensor], rank: int, scaling: float) -> dict[str, Factors]:
    """Return FILA's factors from a sketch of exactly r vectors."""
    layers = target_layers(model)
    return {n: fila_official(x.weight.detach(), rows[n], rank=rank, scaling=scaling) for n, x in layers.items()}


def attached(model: Any, factors: Mapping[str, Factors], rank: int, alpha: float) -> Any:
    """Return a copy of the model with W - s B0 A0 as its base and one adapter that starts at the factors."""
    base = copy.deepcopy(model)
    layers = target_layers(base)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=sorted({n.rsplit(".", 1)[-1] for n in layers})
    )
    found = get_peft_model(base, config)
    with torch.no_grad():
        for name, factor in factors.items():
            layer = found.base_model.model.get_submodule(name)
            W = layer.base_layer.weight
            W -= alpha / rank * factor.B.to(W) @ factor.A.to(W)
            layer.lora_A["default"].weight.copy_(factor.A)
            layer.lora_B["default"].weight.copy_(factor.B)
    return found


def inverted_hinge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed IHL of all tokens, and their number."""
    logits = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    labels = labels[:, 1:].contiguous().view(-1)
    probabilities = logits.softmax(dim=-1)
    supervised = labels != IGNORE
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    target = probabilities.masked_fill(~one_hot, 0).sum(dim=-1)
    runner_up = probabilities.masked_fill(one_hot, 0).max(dim=-1).values
    return ((1 + target - runner_up) * supervised).sum(), supervised.sum()


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each row's summed log-probability of its answer."""
    losses = F.cross_entropy(
        logits[:, :-1].transpose(-1, -2).contiguous(), labels[:, 1:].contiguous(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.sum(dim=-1)


def count(rows: Sequence[Example]) -> int:
    """Return the number of supervised tokens."""
    return sum(label != IGNORE for row in rows for label in row.labels[1:])


def ihl_step(model: Any, pairs: Sequence[Pair], pad_id: int) -> float:
    """Add one optimiser step's gradients of IHL + cross entropy; return the loss."""
    total, items = 0.0, [count([pair[side] for pair in pairs]) for side in (0, 1)]
    for start in range(0, len(pairs), MICRO_BATCH):
        forget, retain = (
            padded([pair[side] for pair in pairs[start : start + MICRO_BATCH]], pad_id) for side in (0, 1)
        )
        value, _ = inverted_hinge(model(**forget, use_cache=False).logits, forget["labels"])
        kept = model(**retain, use_cache=False)
        nll = kept.loss * int((retain["labels"][:, 1:] != IGNORE).sum())
        if kept.logits.dtype == torch.float64:  # the model's own loss is float32 whatever the logits are
            nll = -answer_logprobs(kept.logits, retain["labels"]).sum()
        loss = value / items[0] + nll / items[1]
        loss.backward()
        total += float(loss.detach())
    return total


def npo_kl_step(model: Any, oracle: Any, pairs: Sequence[Pair], pad_id: int, beta: float = 0.1) -> float:
    """Add one optimiser step's gradients of NPO + KL, both against a second model; return the loss."""
    total, items = 0.0, count([pair[1] for pair in pairs])
    for start in range(0, len(pairs), MICRO_BATCH):
        forget, retain = (
            padded([pair[side] for pair in pairs[start : start + MICRO_BATCH]], pad_id) for side in (0, 1)
        )
        with torch.no_grad():
            reference = answer_logprobs(oracle(**forget, use_cache=False).logits, forget["labels"])
            expected = oracle(**retain, use_cache=False).logits.log_softmax(-1)
        ratio = answer_logprobs(model(**forget, use_cache=False).logits, forget["labels"]) - reference
        found = model(**retain, use_cache=False).logits.log_softmax(-1)
        divergence = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)[:, :-1]
        kl = (divergence * (retain["labels"][:, 1:] != IGNORE)).sum() / items
        loss = -2 / beta * F.logsigmoid(-beta * ratio).sum() / len(pairs) + kl
        loss.backward()
        total += float(loss.detach())
    return total


def train(model: Any, steps: Sequence[Sequence[Pair]], pad_id: int, rate: float) -> list[float]:
    """Train for some steps; return their losses."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    losses = []
    model.train()
    for pairs in steps:
        losses.append(ihl_step(model, pairs, pad_id))
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return losses


def scored(model: Any, columns: Sequence[Sequence[Example]], pad_id: int, length: int = 200) -> list[Tensor]:
    """Score candidates, a column of rows at a time, by the model's own loss and then by row from all logits."""
    found = []
    for column in columns:
        for start in range(0, len(column), 8):
            batch = padded(column[start : start + 8], pad_id, length)
            with torch.no_grad():
                logits = model(**batch).logits
            found += list(answer_logprobs(logits, batch["labels"]))
    return found


def gradients(model: Any, step: Callable[[], float]) -> tuple[float, dict[str, Tensor]]:
    """Return a step's loss and gradients of the adapter, by the names that PEFT gives them; none are left behind."""
    loss = step()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, found
