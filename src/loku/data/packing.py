"""Where the tokens of a batch stand: sequences side by side in rows without padding, or padded in sorted groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loku.data.encoding import IGNORE, Example

SPLIT = 192  # tokens of padding that are cheaper than one more forward pass; measured on CPU at 30M parameters


@dataclass(frozen=True)
class Layout:
    """How a model takes several sequences.

    - "packed": rows of sequences side by side, each kept to itself by position ids and an additive mask; rows hold at
      most `longest` tokens (None: no limit), since within the smallest attention window no window hides anything;
    - "flash": one row and the sequences' borders, for attention kernels that take these in place of a mask;
    - "padded": rows of one sequence, sorted by length.

    `balance` is the length of a row at which attention costs as much as all else.
    """

    kind: Literal["packed", "flash", "padded"] = "padded"
    longest: int | None = None
    balance: int = 2560


def lay_out(sequences: Sequence[Sequence[int]], layout: Layout, pad_id: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the blocks that hold the sequences, one forward pass each, and the place where each sequence starts.

    Places count the positions of all blocks, row by row, one block after the other.
    """
    lengths = [len(sequence) for sequence in sequences]
    longest = sum(lengths) if layout.longest is None else layout.longest
    groups: list[tuple[bool, list[list[int]]]] = []  # of each block, whether it is packed, and the members of its rows
    if layout.kind == "flash":
        groups.append((True, [list(range(len(sequences)))]))
    else:
        fits = [i for i, length in enumerate(lengths) if layout.kind == "packed" and length <= longest]
        if fits:
            groups.append((True, _rows(fits, lengths, longest, layout.balance)))
        rest = sorted(set(range(len(sequences))) - set(fits), key=lambda i: lengths[i])
        groups += [(False, [[i] for i in part]) for part in _split(rest, lengths)]
    blocks, starts, offset = [], [0] * len(sequences), 0
    for packed, rows in groups:
        width = max(sum(lengths[i] for i in row) for row in rows)
        for number, row in enumerate(rows):
            place = offset + number * width
            for i in row:
                starts[i] = place
                place += lengths[i]
        offset += len(rows) * width
        if layout.kind == "flash":
            blocks.append(_flash_block([sequences[i] for i in rows[0]]))
        elif packed:  # also of single sequences: given a mask of padding, transformers looks whether there is any
            blocks.append(_packed_block([[sequences[i] for i in row] for row in rows], width, pad_id))
        else:
            blocks.append(_padded_block([sequences[row[0]] for row in rows], width, pad_id))
    return blocks, starts


def part_of_batch(examples: Sequence[Example], starts: Sequence[int] | None, *, every: bool = False) -> dict[str, Any]:
    """Return what losses need to know of some examples of a batch, whose places begin at `starts`.

    `places` are the places that predict the `targets`, example by example; `sequence` is the example each belongs to,
    `weights` what it counts. `every` supervises every token but the first. `rows` are the examples' records, `items`
    the weight of all targets: both are for the host. Without `starts` nobody will look at the places.
    """
    counts, targets, places, weights = [], [], [], []
    weighted = not every and any(example.weights is not None for example in examples)
    for number, example in enumerate(examples):
        labels = example.input_ids if every else example.labels
        at = [t for t in range(1, len(labels)) if labels[t] != IGNORE]
        counts.append(len(at))
        targets += [labels[t] for t in at]
        if starts is not None:
            places += [starts[number] + t - 1 for t in at]
        if weighted:
            weights += [example.token_weights[t] for t in at]
    part: dict[str, Any] = {
        "places": torch.tensor(places, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "sequence": torch.arange(len(examples)).repeat_interleave(torch.tensor(counts)),
        "rows": [example.index for example in examples],
        "items": float(len(targets)),
    }
    if weighted:
        part["weights"] = torch.tensor(weights)
        part["items"] = float(part["weights"].sum())
    return part


def read_ids(example: Example, *, every: bool = False, whole: bool = False) -> list[int]:
    """Return the tokens that must be read: those up to the last that predicts; with `whole` all of them."""
    if whole:
        return example.input_ids
    last = len(example.input_ids) - 1
    if not every:
        while last > 0 and example.labels[last] == IGNORE:
            last -= 1
    return example.input_ids[: max(last, 1)]


def _rows(members: Sequence[int], lengths: Sequence[int], longest: int, balance: int) -> list[list[int]]:
    """Return the sequences side by side in rows, so that rows * width * (balance + width) is small."""
    total, widest = sum(lengths[i] for i in members), max(lengths[i] for i in members)
    best: list[list[int]] = []
    least = float("inf")
    for width in (widest, *(-(-total // count) for count in range(total // widest, 0, -1)), longest):
        if not widest <= width <= longest or total * (balance + width) >= least:
            break  # too wide, or wider rows only cost more
        rows = _first_fit(members, lengths, width)
        filled = max(sum(lengths[i] for i in row) for row in rows)
        cost = len(rows) * filled * (balance + filled)
        if cost < least:
            best, least = rows, cost
    return best


def _first_fit(members: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(members, key=lambda i: -lengths[i]):
        for number, left in enumerate(room):
            if left >= lengths[i]:
                rows[number].append(i)
                room[number] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(width - lengths[i])
    return rows


def _split(ordered: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split sequences in order of length where that saves more padding than a forward pass is worth."""
    if not ordered:
        return []
    longest = lengths[ordered[-1]]
    saved = [(longest - lengths[i]) * place for place, i in enumerate(ordered[:-1], start=1)]
    if not saved or max(saved) <= SPLIT:
        return [list(ordered)]
    place = saved.index(max(saved)) + 1
    return [*_split(ordered[:place], lengths), *_split(ordered[place:], lengths)]


def _padded_block(sequences: Sequence[Sequence[int]], width: int, pad_id: int) -> dict[str, Any]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.tensor([[*sequence, *[pad_id] * (width - len(sequence))] for sequence in sequences])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long()}


def _packed_block(rows: Sequence[Sequence[Sequence[int]]], width: int, pad_id: int) -> dict[str, Any]:
    """`lasts` is, for each place, the last one that may look at it: padding only looks at itself."""
    ids, positions, lasts = [], [], []
    for row in rows:
        flat = [token for sequence in row for token in sequence]
        places = [place for sequence in row for place in range(len(sequence))]
        ends, end = [], -1
        for sequence in row:
            end += len(sequence)
            ends += [end] * len(sequence)
        ids.append([*flat, *[pad_id] * (width - len(flat))])
        positions.append([*places, *[0] * (width - len(flat))])
        lasts.append([*ends, *range(len(flat), width)])
    return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "lasts": torch.tensor(lasts)}


def _flash_block(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    lengths = [len(sequence) for sequence in sequences]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def is_laid_out(part: Mapping[str, Any]) -> bool:
    """Whether a part of a batch says where its tokens stand (`part_of_batch`); otherwise it is padded (`pad_batch`)."""
    return "places" in part


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of nested lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value
