"""Statistics on disk: what is found again, what is not, and that no text and no token id is kept."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Example
from loku.evaluation import scoring
from loku.evaluation.cache import BatchCache
from loku.evaluation.scoring import score

PAD = byte_level_tokenizer().pad_token_id
ROWS = [torch.randint(2, 300, (6 + 3 * n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(8)]
EXAMPLES = [Example(n, ids, [IGNORE] * 3 + ids[3:], 3, 3) for n, ids in enumerate(ROWS)]


def cached(folder, model=None, key="a", examples=EXAMPLES, **options):
    return score(model or tiny_model(), examples, pad_id=PAD, batch_tokens=60, cache=BatchCache(folder, key), **options)


def passes(run):
    """How many batches were computed, and what the call returned."""
    with patch.object(scoring, "tree_statistics", wraps=scoring.tree_statistics) as computed:
        found = run()
    return computed.call_count, found


def same(one, other):
    for left, right in zip(one, other, strict=True):
        assert (left.index, left.tokens, left.nll, left.entropy) == (
            right.index,
            right.tokens,
            right.nll,
            right.entropy,
        )
        for name in ("hits", "logprobs", "means", "variances"):
            assert getattr(left, name).dtype == getattr(right, name).dtype
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_a_second_call_runs_no_batch_and_returns_the_same(tmp_path):
    model = tiny_model()
    first, found = passes(lambda: cached(tmp_path, model))
    second, again = passes(lambda: cached(tmp_path, model))
    assert first > 1
    assert second == 0
    same(found, again)
    same(found, score(model, EXAMPLES, pad_id=PAD, batch_tokens=60))


def test_an_interrupted_call_goes_on(tmp_path):
    model, done = tiny_model(), []

    def interrupt(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    whole, expected = passes(lambda: cached(tmp_path / "other", model))
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", model, progress=interrupt)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    left, found = passes(lambda: cached(tmp_path / "cache", model))
    assert left == whole - 2
    same(found, expected)


def test_another_model_or_other_rows_find_nothing(tmp_path):
    model = tiny_model()
    whole, _ = passes(lambda: cached(tmp_path, model))
    assert passes(lambda: cached(tmp_path, model, key="b"))[0] == whole
    other = [Example(e.index, e.input_ids, [IGNORE] * 4 + e.labels[4:], 4, 4) for e in EXAMPLES]
    assert passes(lambda: cached(tmp_path, model, examples=other))[0] == whole


def test_broken_files_are_written_again(tmp_path):
    model = tiny_model()
    expected = cached(tmp_path, model)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:40])
    files[1].write_bytes(b"")
    calls, found = passes(lambda: cached(tmp_path, model))
    assert calls == 2
    same(found, expected)
    assert passes(lambda: cached(tmp_path, model))[0] == 0


def test_only_numbers_are_kept(tmp_path):
    cached(tmp_path)
    for file in tmp_path.iterdir():
        parts = load_file(file)
        assert {name: array.dtype.name for name, array in parts.items()} == {
            "logprobs": "float32", "hits": "bool", "means": "float32", "variances": "float32", "counts": "int64",
        }  # fmt: skip
