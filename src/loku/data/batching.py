"""Batches: dynamic padding, and forget rows paired with retain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loku.data.encoding import IGNORE, Example
from loku.data.packing import Layout, lay_out, part_of_batch, read_ids

PARTS = ("forget", "alternate", "retain", "retain_alternate")


def pad_batch(examples: Sequence[Example], pad_id: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """Pad examples to the longest of them. The mask comes from lengths, so padding may share an id with text."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[Sequence[Any]], value: float) -> Tensor:
        fill = [[value] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([[*row, *more] if side == "right" else [*more, *row] for row, more in pairs])

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORE),
    }
    if any(example.weights is not None for example in examples):
        batch["weights"] = padded([example.token_weights for example in examples], 0.0)
    return batch


class PairedDataset(Dataset[dict[str, Any]]):
    """Forget examples, each with a retain partner, and with other answers to the same prompts where a loss wants them.

    Partners come from an endless stream of seeded permutations of the retain examples, position epoch * len + i for
    item i: every retain example is used before any repeats, and nothing depends on the order of access. Of an
    example's `alternates` each epoch uses the next one.
    """

    def __init__(
        self,
        forget: list[Example],
        retain: list[Example] | None,
        seed: int = 0,
        *,
        alternates: list[list[Example]] | None = None,
        retain_alternates: list[list[Example]] | None = None,
    ) -> None:
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.alternates = alternates
        self.retain_alternates = retain_alternates
        self.epoch = 0
        self._permutations: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Move on to the partners of an epoch."""
        self.epoch = epoch
        self._permutations.clear()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row: dict[str, Any] = {"forget": self.forget[item], "position": item}
        if self.alternates is not None:
            row["draw"] = self.epoch % len(self.alternates[item])
            row["alternate"] = self.alternates[item][row["draw"]]
        if self.retain:
            cycle, place = divmod(self.epoch * len(self) + item, len(self.retain))
            partner = self._permutation(cycle)[place]
            row["retain"] = self.retain[partner]
            if self.retain_alternates is not None:
                others = self.retain_alternates[partner]
                row["retain_alternate"] = others[self.epoch % len(others)]
        return row

    def _permutation(self, cycle: int) -> list[int]:
        if cycle not in self._permutations:
            assert self.retain is not None
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + cycle)
            self._permutations[cycle] = torch.randperm(len(self.retain), generator=generator).tolist()
        return self._permutations[cycle]


@dataclass(frozen=True)
class Plan:
    """What becomes of each part of a batch. Parts that are not `laid_out` (`part_of_batch`) are padded (`pad_batch`).

    `read` are the parts that the model runs on: each in blocks of its own, or with `together` all in one list of
    blocks. Of those in `whole` the last token is read, too; of those in `every` all tokens are supervised.
    """

    layout: Layout | None = None
    laid_out: frozenset[str] = frozenset()
    together: bool = False
    read: frozenset[str] = frozenset(PARTS)
    whole: frozenset[str] = frozenset()
    every: frozenset[str] = frozenset()


class PairedCollator:
    """Makes batches of the parts of each item: forget, retain, and the alternates of both, where they are there.

    `level` holds what IHL compares each forget example's tokens with, by place in the forget list.
    """

    def __init__(self, pad_id: int, plan: Plan | None = None, level: Sequence[Tensor] | None = None) -> None:
        self.pad_id = pad_id
        self.plan = plan or Plan()
        self.level = level

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one batch. Of forget rows, `position` is the place in the forget list, `index` the record's."""
        rows = {part: [item[part] for item in items] for part in PARTS if part in items[0]}
        batch: dict[str, Any] = {p: pad_batch(r, self.pad_id) for p, r in rows.items() if p not in self.plan.laid_out}
        laid_out = {part: examples for part, examples in rows.items() if part in self.plan.laid_out}
        read = {part: examples for part, examples in laid_out.items() if part in self.plan.read}
        for group in [read] if self.plan.together else [{part: examples} for part, examples in read.items()]:
            blocks, parts = self._lay_out(group)
            batch |= parts
            if self.plan.together:
                batch["blocks"] = blocks
            else:
                batch[next(iter(group))]["blocks"] = blocks
        for part in laid_out.keys() - read.keys():
            batch[part] = part_of_batch(laid_out[part], None, every=part in self.plan.every)
        batch["forget"]["index"] = torch.tensor([item["forget"].index for item in items])
        batch["forget"]["position"] = torch.tensor([item["position"] for item in items])
        if self.level is not None:
            batch["forget"]["level"] = torch.cat([self.level[item["position"]] for item in items])
        if "alternate" in batch:
            batch["alternate"]["draw"] = torch.tensor([item["draw"] for item in items])
        return batch

    def _lay_out(self, group: dict[str, list[Example]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        plan = self.plan
        assert plan.layout is not None
        sequences = [
            read_ids(example, every=part in plan.every, whole=part in plan.whole)
            for part, examples in group.items()
            for example in examples
        ]
        blocks, starts = lay_out(sequences, plan.layout, self.pad_id)
        parts: dict[str, Any] = {}
        for part, examples in group.items():
            parts[part] = part_of_batch(examples, starts[: len(examples)], every=part in plan.every)
            starts = starts[len(examples) :]
        return blocks, parts
