"""EL and MA against one generation per prefix, and what the shortcut must not change."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Example
from loku.evaluation import extraction
from loku.evaluation.extraction import (
    Extraction,
    extraction_likelihood,
    forgotten,
    measure_extraction,
    needed_misses,
    next_misses,
)

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.eos_token_id


def slow_overlap(said, true, n):
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    wanted = [tuple(true[i : i + n]) for i in range(len(true) - n + 1)]
    return sum(gram in wanted for gram in grams) / len(wanted)


def slow_likelihood(tokens, say, n):
    """The definition: a greedy continuation from every prefix."""
    end = len(tokens)
    return sum(slow_overlap(say(tokens[:i]), tokens[i:], n) for i in range(1, end - n + 1)) / (end - n)


def text(ids, index=0):
    return Example(index, list(ids), [IGNORE, *ids[1:]], 1, 1)


class Table:
    """A next-token rule over few tokens, as a stand-in for a model: deterministic, with habits."""

    def __init__(self, seed, kinds):
        self.random, self.kinds, self.known = random.Random(seed), kinds, {}

    def next(self, prefix):
        key = tuple(prefix[-2:])
        return self.known.setdefault(key, self.random.randrange(self.kinds))

    def say(self, prefix, total, stops=()):
        said = list(prefix)
        while len(said) < total:
            token = self.next(said)
            if token in stops:
                break
            said.append(token)
        return said[len(prefix) :]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(2, 4), st.integers(1, 4), st.booleans())
def test_decoding_once_per_miss_is_exact(seed, length, kinds, n, ends):
    table, tokens = Table(seed, kinds), [random.Random(seed + 1).randrange(kinds)]
    for _ in range(length - 1):  # mostly what the rule says, sometimes not
        tokens.append(table.next(tokens) if random.Random(f"{seed}:{tokens}").random() < 0.7 else seed % kinds)
    stops = (0,) if ends else ()
    hits = [table.next(tokens[:place]) == tokens[place] for place in range(1, length)]
    needed = needed_misses(hits, n)
    known = {place: table.say(tokens[:place], length, stops) for place in needed}
    found = extraction_likelihood(tokens, hits, known, n, stops)
    if length <= n:
        assert math.isnan(found)
        assert not needed
        return
    assert found == pytest.approx(slow_likelihood(tokens, lambda prefix: table.say(prefix, length, stops), n))
    assert 0 <= found <= 1


def test_misses():
    assert next_misses([True, False, True, True]).tolist() == [1, 1, 4, 4]
    assert next_misses([False]).tolist() == [0]
    assert next_misses([]).tolist() == []
    assert needed_misses([True, True], 1) == []
    assert needed_misses([False, True, False, False], 2) == [1, 3]  # no prefix of at most 3 tokens runs into the last


def test_texts_too_short_for_an_n_gram():
    assert math.isnan(extraction_likelihood([1, 2, 3], [True, True], {}, 3))
    assert extraction_likelihood([1, 2, 3], [True, True], {}, 2) == 1.0
    assert extraction_likelihood([1, 2], [False], {1: [5]}, 1) == 0.0
    assert extraction_likelihood([1, 2, 2], [False, True], {1: []}, 1) == pytest.approx(0.5)  # nothing is said at first


@pytest.fixture(scope="module")
def taught():
    """A tiny model that half knows three texts."""
    model = tiny_model()
    rows = [
        torch.randint(2, 300, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (9, 16, 24)
    ]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        loss = sum(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), rows


def greedy(model, prefix, total):
    said = list(prefix)
    with torch.no_grad():
        while len(said) < total:
            token = int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax())
            if token == EOS:
                break
            said.append(token)
    return said[len(prefix) :]


def test_extraction_of_a_model_against_a_generation_per_prefix(taught):
    model, rows = taught
    found = measure_extraction(model, TOKENIZER, [text(row) for row in rows], ngrams=(1, 3, 10), batch_rows=7)
    for row, one in zip(rows, found, strict=True):
        right = [greedy(model, row[:place], place + 1) == [row[place]] for place in range(1, len(row))]
        assert one.ma == pytest.approx(np.mean(right))
        assert set(one.el) == {n for n in (1, 3, 10) if len(row) > n}
        for n, value in one.el.items():
            expected = slow_likelihood(row, lambda prefix, row=row: greedy(model, prefix, len(row)), n)
            assert value == pytest.approx(expected)
    assert 0 < np.mean([one.ma for one in found]) < 1
    assert max(one.el[1] for one in found) > 0


def test_scores_that_are_known_are_not_computed_again(taught, monkeypatch):
    model, rows = taught
    examples = [text(row) for row in rows]
    expected = measure_extraction(model, TOKENIZER, examples)
    hits = extraction.memorised(model, TOKENIZER, examples)
    monkeypatch.setattr(extraction, "score", None)
    assert measure_extraction(model, TOKENIZER, examples, hits=hits) == expected


def test_the_rule_tests_accuracy_before_it_decodes(taught, monkeypatch):
    model, rows = taught
    examples = [text(row) for row in rows]
    found = measure_extraction(model, TOKENIZER, examples, ngrams=(3,))
    ma, el = np.mean([one.ma for one in found]), np.mean([one.el[3] for one in found])
    assert forgotten(model, TOKENIZER, examples, Extraction(ma + 0.01, {3: el + 0.01}))
    assert not forgotten(model, TOKENIZER, examples, Extraction(ma + 0.01, {3: el}))  # not below
    monkeypatch.setattr(extraction, "judged", None)
    assert not forgotten(model, TOKENIZER, examples, Extraction(ma, {3: 1.0}))


def test_one_short_text(taught):
    [found] = measure_extraction(taught[0], TOKENIZER, [text([5, 9])])
    assert found.el == {}
    assert found.ma in (0.0, 1.0)
