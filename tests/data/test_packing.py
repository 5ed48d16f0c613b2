"""Where tokens stand: every sequence is found again, to itself, in whatever layout, and little is padded."""

from __future__ import annotations

import random

import pytest
import torch

from loku.data.encoding import IGNORE, Example
from loku.data.packing import Layout, lay_out, part_of_batch, read_ids, to_device

PAD = 0


def sequences(count, seed=0, shortest=1, longest=40):
    draw = random.Random(seed)
    return [[draw.randrange(1, 99) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def flat(blocks):
    return [token for block in blocks for row in block["input_ids"].tolist() for token in row]


LAYOUTS = [Layout(), Layout("packed"), Layout("packed", longest=64), Layout("packed", longest=20), Layout("flash")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kind} {x.longest}")
@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_every_sequence_stands_where_its_start_says_and_nothing_else_but_padding(layout, count):
    rows = sequences(count, seed=count)
    blocks, starts = lay_out(rows, layout, PAD)
    places = flat(blocks)
    for row, start in zip(rows, starts, strict=True):
        assert places[start : start + len(row)] == row
    assert len({p for row, s in zip(rows, starts, strict=True) for p in range(s, s + len(row))}) == sum(map(len, rows))
    assert sum(token != PAD for token in places) == sum(map(len, rows))


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_in_packed_rows_a_token_sees_its_own_sequence_up_to_itself(count):
    rows = sequences(count, seed=count)
    blocks, starts = lay_out(rows, Layout("packed"), PAD)
    owner, position = {}, {}
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for t in range(len(row)):
            owner[start + t], position[start + t] = number, t
    offset = 0
    for block in blocks:
        rows_of_block, width = block["input_ids"].shape
        for r in range(rows_of_block):
            for i in range(width):
                place = offset + r * width + i
                if "lasts" not in block:  # one sequence a row: the usual causal mask
                    assert bool(block["attention_mask"][r, i]) == (place in owner)
                    continue
                assert block["position_ids"][r, i] == position.get(place, 0)
                seen = [j for j in range(width) if j <= i <= block["lasts"][r, j]]
                first = place - position[place] - offset - r * width if place in owner else i
                assert seen == list(range(first, i + 1))
        offset += rows_of_block * width


def test_rows_no_longer_than_allowed_and_longer_sequences_on_their_own():
    rows = [*sequences(20, shortest=2, longest=20), [1] * 50]
    blocks, _ = lay_out(rows, Layout("packed", longest=32), PAD)
    packed = [block for block in blocks if "lasts" in block]
    assert packed
    assert all(block["input_ids"].shape[1] <= 32 for block in packed)
    assert any("lasts" not in block and block["input_ids"].shape[1] == 50 for block in blocks)


def test_packing_leaves_little_padding():
    rows = sequences(64, seed=5, shortest=40, longest=120)
    total = sum(map(len, rows))
    (packed,), _ = lay_out(rows, Layout("packed", balance=2560), PAD)
    assert packed["input_ids"].numel() < 1.06 * total
    padded, _ = lay_out(rows, Layout(), PAD)
    sorted_apart = sum(block["input_ids"].numel() for block in padded)
    assert sorted_apart < 0.9 * len(rows) * max(map(len, rows))
    assert packed["input_ids"].numel() < sorted_apart


def test_rows_are_short_where_attention_is_dear():
    rows = sequences(64, seed=5, shortest=40, longest=120)
    widths = [lay_out(rows, Layout("packed", balance=b), PAD)[0][0]["input_ids"].shape[1] for b in (1, 10**9)]
    assert widths[0] <= widths[1]
    assert widths[0] <= 1.1 * max(map(len, rows))


def test_flash_borders_are_the_sequences_ends():
    rows = sequences(4)
    (block,), starts = lay_out(rows, Layout("flash"), PAD)
    assert block["cu_seq_lens_q"].tolist() == [*starts, sum(map(len, rows))]
    assert block["cu_seq_lens_q"].dtype == torch.int32
    assert block["max_length_q"] == max(map(len, rows))
    assert block["position_ids"].tolist() == [[t for row in rows for t in range(len(row))]]


EXAMPLE = Example(3, [5, 6, 7, 8, 9], [IGNORE, IGNORE, 7, 8, IGNORE], 2, 2)
WEIGHTED = Example(4, [5, 6, 7, 8], [IGNORE, 6, 7, 8], 1, 1, weights=(9.0, 1.0, 0.0, 0.5))


def test_only_what_predicts_is_read():
    assert read_ids(EXAMPLE) == [5, 6, 7]
    assert read_ids(EXAMPLE, every=True) == [5, 6, 7, 8]
    assert read_ids(EXAMPLE, whole=True) == [5, 6, 7, 8, 9]
    assert read_ids(Example(0, [5, 6], [IGNORE, IGNORE], 2, 2)) == [5]  # nothing to learn, but a row of something
    assert read_ids(Example(0, [5], [5], 0, 0)) == [5]


def test_a_part_says_which_place_predicts_what():
    part = part_of_batch([EXAMPLE, WEIGHTED], [10, 0])
    assert part["places"].tolist() == [11, 12, 0, 1, 2]
    assert part["targets"].tolist() == [7, 8, 6, 7, 8]
    assert part["sequence"].tolist() == [0, 0, 1, 1, 1]
    assert part["weights"].tolist() == [1, 1, 1, 0, 0.5]
    assert part["items"] == 3.5
    assert part["rows"] == [3, 4]
    every = part_of_batch([EXAMPLE, WEIGHTED], [10, 0], every=True)
    assert every["places"].tolist() == [10, 11, 12, 13, 0, 1, 2]
    assert every["items"] == 7
    assert "weights" not in every


def test_a_batch_without_anything_to_learn_has_empty_parts():
    part = part_of_batch([Example(0, [5, 6], [IGNORE, IGNORE], 2, 2)], [0])
    assert part["places"].tolist() == []
    assert part["places"].dtype == torch.long
    assert part["items"] == 0


def test_nested_tensors_move_and_all_else_stays():
    moved = to_device({"a": [{"b": torch.ones(2)}], "n": 3, "rows": [1, 2]}, torch.device("meta"))
    assert moved["a"][0]["b"].device.type == "meta"
    assert moved["n"] == 3
    assert moved["rows"] == [1, 2]
