"""Batches: masks from lengths, partners that are all used before any repeats."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from builders import tiny_model
from loku.data.batching import PairedCollator, PairedDataset, pad_batch
from loku.data.encoding import IGNORE, Example

PAD = EOS = 0


def example(index, length, prompt=1):
    ids = [10 * index + place + 1 for place in range(length - 1)] + [EOS]
    return Example(index, ids, [IGNORE] * prompt + ids[prompt:], prompt, prompt)


SHORT, LONG = example(1, 3), example(2, 5, prompt=2)


def test_padding_on_either_side():
    right, left = pad_batch([SHORT, LONG], PAD), pad_batch([SHORT, LONG], PAD, side="left")
    assert right["input_ids"].tolist() == [[11, 12, EOS, PAD, PAD], [21, 22, 23, 24, EOS]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert right["labels"].tolist() == [[IGNORE, 12, EOS, IGNORE, IGNORE], [IGNORE, IGNORE, 23, 24, EOS]]
    assert left["input_ids"].tolist() == [[PAD, PAD, 11, 12, EOS], [21, 22, 23, 24, EOS]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert left["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, 12, EOS], [IGNORE, IGNORE, 23, 24, EOS]]
    assert all(value.dtype == torch.long for value in right.values())


def test_the_end_of_a_sequence_stays_in_the_mask_when_it_also_pads():
    batch = pad_batch([SHORT, LONG], EOS)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert (batch["labels"] == EOS).sum(1).tolist() == [1, 1]  # the end is learnt once, padding never


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_sees_no_padding(side):
    model = tiny_model()
    batch = pad_batch([SHORT, LONG], EOS, side=side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
    ).logits
    alone = model(input_ids=torch.tensor([SHORT.input_ids])).logits[0]
    kept = together[0][batch["attention_mask"][0].bool()]
    torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-5)


def partners(dataset, epochs):
    seen = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        seen.append([dataset[i]["retain"].index for i in range(len(dataset))])
    return seen


def paired(forget, retain, seed=0):
    return PairedDataset([example(i, 3) for i in range(forget)], [example(i, 4) for i in range(retain)], seed)


@pytest.mark.parametrize(("forget", "retain"), [(3, 7), (7, 3), (4, 4), (5, 1), (1, 5)])
def test_all_retain_rows_are_used_before_any_repeats(forget, retain):
    stream = [index for epoch in partners(paired(forget, retain), 6) for index in epoch]
    for start in range(0, len(stream), retain):
        turn = stream[start : start + retain]
        assert len(set(turn)) == len(turn)


def test_every_pass_over_the_retain_rows_has_another_order():
    stream = [index for epoch in partners(paired(4, 20), 10) for index in epoch]
    assert stream[:20] != stream[20:] != list(range(20))


def test_partners_depend_on_seed_and_epoch_only():
    expected = partners(paired(5, 8, seed=3), 4)
    assert partners(paired(5, 8, seed=3), 4) == expected != partners(paired(5, 8, seed=4), 4)
    dataset = paired(5, 8, seed=3)
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    for epoch in (3, 0, 2):  # in any order of epochs and of items
        dataset.set_epoch(epoch)
        assert [dataset[i]["retain"].index for i in (4, 1, 3, 0, 2)] == [expected[epoch][i] for i in (4, 1, 3, 0, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("retain", [None, []])
def test_without_retain_rows_there_is_no_partner(retain):
    dataset = PairedDataset([example(0, 3)], retain)
    assert dataset[0] == {"forget": example(0, 3), "position": 0}
    assert set(PairedCollator(PAD)([dataset[0]])) == {"forget"}


def test_the_two_halves_are_padded_on_their_own():
    dataset = PairedDataset([example(5, 3), example(6, 4)], [example(7, 9), example(8, 8)])
    (batch,) = DataLoader(dataset, batch_size=2, collate_fn=PairedCollator(PAD), shuffle=False)
    assert batch["forget"]["input_ids"].shape == (2, 4)
    assert batch["retain"]["input_ids"].shape == (2, 9)
    assert batch["forget"]["index"].tolist() == [5, 6]
    assert batch["forget"]["position"].tolist() == [0, 1]
    assert set(batch["retain"]) == {"input_ids", "attention_mask", "labels"}
