"""Token trees: sequences that begin alike share the computation of what they share, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loku.losses.lm_head import HeadSpec, last_hidden_state, unwrapped

ATTENTION_SHARE = 5  # x hidden size = the length at which attention costs as much as all else; measured on CPU
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")  # where configurations say it
TINY = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 7, 8), (1, 2, 9, 4, 5, 3, 8), (1, 2, 3, 4, 1, 2))  # the check's sequences
ERROR, SHARE = 1e-4, 0.02  # most that the check's states may differ: of their size (float32), of what a mask changes


@dataclass
class Tree:
    """Sequences as a trie of tokens, in depth-first order, the children of a node one after the other.

    Node i is token `ids[i]` at position `depths[i]` of every sequence that passes through it, and the nodes below it
    are those up to `lasts[i]`; so j is i or one of its ancestors exactly when j <= i <= lasts[j]. `paths` has the nodes
    of each of the `members`, the sequences' places in whatever list they come from.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    lasts: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children: then plain causal attention is the tree's attention."""
        return self.depths[-1] == len(self) - 1

    def add(self, member: int, sequence: Sequence[int]) -> None:
        """Add a sequence. Sequences come in lexicographic order, so that each shares most with the one before it."""
        shared = self.shared(sequence)
        start = len(self)
        path = (self.paths[-1][:shared] if shared else []) + list(range(start, start + len(sequence) - shared))
        self.ids += sequence[shared:]
        self.depths += range(shared, len(sequence))
        self.lasts += [0] * (len(self) - start)
        for node in path:
            self.lasts[node] = path[-1]
        self.members.append(member)
        self.paths.append(path)

    def shared(self, sequence: Sequence[int]) -> int:
        """Return how many tokens a sequence has in common with the one that was added last."""
        count = 0
        if self.paths:
            for node, token in zip(self.paths[-1], sequence, strict=False):
                if self.ids[node] != token:
                    break
                count += 1
        return count


@dataclass(frozen=True)
class TreeSupport:
    """What trees a model reads exactly: of at most `longest` nodes (None: no limit).

    Within the smallest attention window no layer's window hides anything, whether it counts positions or places in the
    row; larger trees are not made. `balance` is the length of a row at which attention costs as much as all else.
    """

    longest: int | None
    balance: int


def grow_trees(sequences: Sequence[Sequence[int]], support: TreeSupport | None) -> list[Tree]:
    """Merge sequences into trees, one tree a row, where that costs less than rows of their own.

    With c the `balance`, a row of n nodes costs n (c + n): every node attends to the whole row. None makes a tree of
    every sequence.
    """
    trees: list[Tree] = []
    for place in sorted(range(len(sequences)), key=lambda item: list(sequences[item])):
        sequence = sequences[place]
        if not (support and trees and _pays(trees[-1], sequence, support)):
            trees.append(Tree())
        trees[-1].add(place, sequence)
    return trees


def _pays(tree: Tree, sequence: Sequence[int], support: TreeSupport) -> bool:
    size, own = len(tree), len(sequence)
    joined = size + own - tree.shared(sequence)
    if support.longest is not None and joined > support.longest:
        return False
    c = support.balance
    return joined * (c + joined) < size * (c + size) + own * (c + own)


def tree_batch(trees: Sequence[Tree], pad_id: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the input of a forward pass over trees, one a row, padded on the right.

    Chains alone get an ordinary mask of padding. Others get position ids and an additive mask, 0 where a node may look
    and the type's minimum elsewhere: every attention implementation and architecture takes that one or is found out
    by `tree_support` (a bool mask is added as 0 and 1 by GPT-Neo, silently).
    """
    longest = max(map(len, trees))
    ids = torch.full((len(trees), longest), pad_id)
    depths = torch.zeros_like(ids)
    lasts = torch.arange(longest).repeat(len(trees), 1)  # padding sees itself: no row of the mask is empty
    for row, tree in enumerate(trees):
        ids[row, : len(tree)] = torch.tensor(tree.ids)
        depths[row, : len(tree)] = torch.tensor(tree.depths)
        lasts[row, : len(tree)] = torch.tensor(tree.lasts)
    if all(tree.is_chain for tree in trees):
        lengths = torch.tensor([len(tree) for tree in trees])
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long()}
    return {"input_ids": ids, "attention_mask": ancestor_mask(lasts, dtype), "position_ids": depths}


def ancestor_mask(lasts: Int[Tensor, "rows nodes"], dtype: torch.dtype) -> Float[Tensor, "rows 1 nodes nodes"]:
    """Return the additive attention mask of trees: node i sees j when j <= i <= lasts[j]."""
    place = torch.arange(lasts.shape[1], device=lasts.device)
    seen = (place <= place.unsqueeze(1)) & (place.unsqueeze(1) <= lasts.unsqueeze(1))
    mask = torch.zeros(seen.shape, dtype=dtype, device=lasts.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def tree_support(model: nn.Module, head: HeadSpec) -> TreeSupport | str:
    """Return which trees a model reads exactly, or the reason why it reads none.

    No list of architectures is trusted: the model reads a tiny tree and its sequences as rows of their own, and the
    states that enter its head must be the same, by a margin that a wrong mask or wrong positions cannot meet. Attention
    windows are read from the configuration, since no tiny tree reaches them. Call it once per model, in eval mode.
    """
    windows = _windows(model)
    if windows and min(windows) < sum(map(len, TINY)):
        return f"its attention window of {min(windows)} tokens is too small for trees"
    vocab = head.module.weight.shape[0]
    if vocab <= max(map(max, TINY)):
        return f"its vocabulary of {vocab} tokens is too small for the check"
    try:
        with torch.no_grad():
            reason = _disagreement(model, head)
    except Exception as error:  # whatever a model's own code raises, the plain path remains
        message = " ".join(str(error).split())[:200]
        reason = f"the check of its attention failed ({type(error).__name__}: {message})"
    if reason:
        return reason
    return TreeSupport(min(windows, default=None), ATTENTION_SHARE * head.module.weight.shape[1])


def _windows(model: nn.Module) -> list[int]:
    """Return every length beyond which some layer cannot look, the context's included."""
    config: Any = unwrapped(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, name, None) for name in (*WINDOWS, "max_position_embeddings")]
    return [length for length in found if isinstance(length, int) and length > 0]


def _disagreement(model: nn.Module, head: HeadSpec) -> str | None:
    """Return how the states of a tree differ from those of its sequences, or None."""
    weight = head.module.weight
    tree, packed, chains = Tree(), Tree(), [Tree() for _ in TINY]
    for place, sequence in enumerate(sorted(TINY)):
        tree.add(place, sequence)
        chains[place].add(0, sequence)
    packed.add(0, tree.ids)  # the same row under a causal mask: what it changes is what the check must see
    rows = [_states(model, head, [item], weight)[0] for item in (tree, packed)]
    error = effect = size = 0.0
    for path, states_of_row in zip(tree.paths, _states(model, head, chains, weight), strict=True):
        alone = states_of_row[: len(path)]
        error, effect = (
            max(known, float((states[path] - alone).abs().max()))
            for known, states in zip((error, effect), rows, strict=True)
        )
        size = max(size, float(alone.abs().max()))
    exact = weight.dtype in (torch.float32, torch.float64)
    if effect > 0 and error <= SHARE * effect and (error <= ERROR * size or not exact):
        return None
    return f"its hidden states on a token tree are not those of the sequences (off by {error:.1e} of {size:.1e})"


def _states(model: nn.Module, head: HeadSpec, trees: list[Tree], weight: Tensor) -> Float[Tensor, "rows nodes d"]:
    batch = {name: value.to(weight.device) for name, value in tree_batch(trees, 0, weight.dtype).items()}
    return last_hidden_state(model, batch, head).float()
