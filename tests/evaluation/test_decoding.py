"""Decoding with a cache, from what is known already: the same answers as transformers' own greedy generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Example
from loku.evaluation import decoding, generation
from loku.evaluation.decoding import decode, decodes_plainly
from loku.evaluation.generation import generate, known_start
from loku.evaluation.scoring import score

TOKENIZER = byte_level_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
PROMPTS = [
    torch.randint(2, 300, (3 + 4 * (seed % 5),), generator=torch.Generator().manual_seed(seed)).tolist()
    for seed in range(7)
]
LIMITS = [6, 1, 9, 2, 6, 12, 3]


def sharp(architecture):
    """A tiny model whose greedy answers do not just repeat the last token, and which ends some of them."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def by_transformers(model, prompt, new_tokens, stops=(EOS,)):
    """The reference: transformers' own loop, one row at a time."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=PAD,
    )
    ids = output[0, len(prompt) :].tolist()
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def answered(prompt, answer, *, end=True):
    ids = [*prompt, *answer] + [EOS] * end
    return Example(0, ids, [IGNORE] * len(prompt) + ids[len(prompt) :], len(prompt), len(prompt))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_rows_of_different_length_and_limit_say_what_transformers_says(architecture):
    model = sharp(architecture)
    assert decodes_plainly(model) is None
    long = [by_transformers(model, prompt, 12) for prompt in PROMPTS]
    stop = long[0][3]  # ends the first row early
    found = decode(model, PROMPTS, LIMITS, [EOS, stop], PAD)
    expected = [by_transformers(model, prompt, n, (EOS, stop)) for prompt, n in zip(PROMPTS, LIMITS, strict=True)]
    assert found == expected
    assert len(found[0]) <= 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_known_from_scoring_changes_no_answer(architecture):
    model = sharp(architecture)
    plain = [by_transformers(model, prompt, 12) for prompt in PROMPTS]
    examples = []
    for number, (prompt, ids) in enumerate(zip(PROMPTS, plain, strict=True)):
        answer = ids[: 2 * number]  # memorised to a growing part, then something else
        examples.append(answered(prompt, [*answer, 5, 6, 7]))
    scores = score(model, examples, pad_id=PAD, eos_ids=[EOS])
    known = [
        known_start(example, found.hits, len(prompt))
        for example, found, prompt in zip(examples, scores, PROMPTS, strict=True)
    ]
    for ids, start in zip(plain, known, strict=True):
        assert ids[: len(start)] == start
    assert all(len(start) >= min(2 * n, len(ids)) for n, (start, ids) in enumerate(zip(known, plain, strict=True)))
    assert max(map(len, known)) >= 10
    for limits in (12, LIMITS):
        each = [limits] * 7 if isinstance(limits, int) else limits
        expected = [ids[:limit] for ids, limit in zip(plain, each, strict=True)]
        for given in (None, known):
            found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=limits, known=given)
            assert [list(answer.ids) for answer in found] == expected


def counting(model):
    calls = []
    return calls, model.register_forward_hook(lambda *_: calls.append(1))


def test_a_memorised_row_is_not_decoded_at_all():
    model, done = sharp("llama"), []
    calls, _ = counting(model)
    found = generate(
        model, TOKENIZER, PROMPTS[:3], max_new_tokens=4, known=[[9, 8, EOS, 7], [9, 8, 7, 6, 5], [EOS]],
        progress=done.append,
    )  # fmt: skip
    assert [answer.ids for answer in found] == [(9, 8), (9, 8, 7, 6), ()]
    assert (calls, done) == ([], [3])


def test_decoding_starts_at_the_first_miss():
    model = sharp("llama")
    answer = by_transformers(model, PROMPTS[1], 12)
    assert len(answer) == 12
    calls, handle = counting(model)
    (found,) = generate(model, TOKENIZER, [PROMPTS[1]], max_new_tokens=12, known=[answer[:9]])
    handle.remove()
    assert list(found.ids) == answer
    checks, handle = counting(model)
    decodes_plainly(model)
    handle.remove()
    assert len(calls) - len(checks) == 3


def test_known_starts_stop_at_misses_and_at_what_was_not_scored():
    example = Example(0, list(range(10)), [IGNORE, IGNORE, 2, 3, 4, IGNORE, 6, 7, 8, 9], 2, 2)
    hits = [True, True, True, True, False, True, True]
    assert known_start(example, hits, 2) == [2, 3, 4]
    assert known_start(example, hits, 3) == [3, 4]
    assert known_start(example, hits, 5) == []
    assert known_start(example, hits, 6) == [6]
    assert known_start(example, hits, 8) == [8, 9]
    assert known_start(example, hits, 10) == []


class Odd(nn.Module):
    """A model whose cache cannot be used from outside, as that of a recurrent one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config

    def forward(self, **inputs):
        if inputs.get("past_key_values") is not None:
            raise TypeError("no such cache")
        return self.model(**inputs)

    def generate(self, **inputs):
        return self.model.generate(**inputs)


def test_other_caches_are_left_to_transformers(monkeypatch):
    model = sharp("llama")
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    assert decodes_plainly(Odd(model)) == "the check of its cache failed (TypeError: no such cache)"
    assert generate(Odd(model), TOKENIZER, PROMPTS, max_new_tokens=6) == expected
    monkeypatch.setattr(generation, "decodes_plainly", lambda _: "a reason")
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=6) == expected
    known = [list(answer.ids[:2]) for answer in expected]
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, known=known) == expected


def test_the_check_finds_a_cache_that_loses_rows(monkeypatch):
    monkeypatch.setattr(decoding.Decoder, "keep", lambda self, rows: setattr(self, "mask", self.mask[rows]))
    assert decodes_plainly(sharp("llama")) is not None


def test_half_precision_is_decoded_plainly():
    assert decodes_plainly(sharp("llama").bfloat16()) is None
