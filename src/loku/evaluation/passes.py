"""Forward passes over token trees: statistics of every supervised token, logits at supervised positions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loku.data.encoding import IGNORE, Example
from loku.evaluation.distributions import label_statistics
from loku.evaluation.modes import evaluating
from loku.evaluation.token_tree import Tree, TreeSupport, tree_batch, tree_support
from loku.losses.lm_head import HeadSpec, last_hidden_state, lm_head_of

PAIR = 2**32  # labels are smaller


@dataclass(frozen=True)
class Reading:
    """How a model is read: the head that makes its logits and the trees that it takes, or the reason why not.

    Without a head whole logits are made; without trees every sequence is a row of its own.
    """

    head: HeadSpec | None = None
    trees: TreeSupport | None = None
    reason: str | None = None


class Statistics(NamedTuple):
    """The statistics of one sequence's supervised tokens, in their order: see `LabelStatistics`."""

    logprobs: NDArray[np.float32]
    hits: NDArray[np.bool_]
    means: NDArray[np.float32]
    variances: NDArray[np.float32]


def reading_of(model: nn.Module) -> Reading:
    """Find out how a model can be read, by a few tiny passes: `lm_head_of` and `tree_support`."""
    head = lm_head_of(model)
    if isinstance(head, str):
        return Reading(reason=head)
    with evaluating(model):
        trees = tree_support(model, head)
    return Reading(head, reason=trees) if isinstance(trees, str) else Reading(head, trees)


def tree_statistics(
    model: nn.Module, head: HeadSpec | None, trees: Sequence[Tree], examples: Sequence[Example], pad_id: int
) -> list[Statistics]:
    """Run one forward pass over trees of examples and return the statistics of their members, tree by tree.

    `examples` is what the trees' members count in; a tree need not reach beyond the last token that predicts. A label
    that several members share (same node, same token) is looked up once, and a node's distribution is computed once,
    however many labels follow it.
    """
    parameter = next(model.parameters())
    dtype = parameter.dtype if head is None else head.module.weight.dtype
    batch = {name: value.to(parameter.device) for name, value in tree_batch(trees, pad_id, dtype).items()}
    width = batch["input_ids"].shape[1]
    pairs, counts = [], []
    for row, tree in enumerate(trees):
        for member, path in zip(tree.members, tree.paths, strict=True):
            labels = np.array(examples[member].labels[1:])
            places = np.flatnonzero(labels != IGNORE)
            pairs.append((row * width + np.array(path)[places]) * PAIR + labels[places])
            counts.append(len(places))
    unique, inverse = np.unique(np.concatenate(pairs), return_inverse=True)
    nodes, sources = np.unique(unique // PAIR, return_inverse=True)
    states = model(**batch, use_cache=False).logits if head is None else last_hidden_state(model, batch, head)
    chosen, of_label, label = (torch.from_numpy(item).to(states.device) for item in (nodes, sources, unique % PAIR))
    found = label_statistics(states.flatten(0, 1).index_select(0, chosen), head, of_label, label)
    logprobs, hits, means, variances = (item.cpu().numpy()[inverse] for item in found)
    parts = [np.split(item, np.cumsum(counts)[:-1]) for item in (logprobs, hits > 0, means, variances)]
    return [Statistics(*item) for item in zip(*parts, strict=True)]
