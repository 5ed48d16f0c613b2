"""Batched greedy answers against a plain loop without cache, padding or batches."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.evaluation.generation import generate

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [
    torch.randint(2, 300, (3 + 4 * (seed % 5),), generator=torch.Generator().manual_seed(seed)).tolist()
    for seed in range(7)
]


def greedy(model, prompt, new_tokens):
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_say_what_single_rows_say(architecture):
    model = tiny_model(architecture)
    found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert list(answer.ids) == greedy(model, prompt, 6)
        assert answer.text == TOKENIZER.decode(answer.ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_size_and_order_do_not_matter(rows):
    model = tiny_model()
    together = generate(model, TOKENIZER, PROMPTS, max_length=18)
    assert generate(model, TOKENIZER, PROMPTS[::-1], max_length=18, batch_rows=rows)[::-1] == together
    assert generate(model, TOKENIZER, PROMPTS, max_length=18, batch_tokens=40) == together


def test_the_total_length_is_each_rows_own_and_one_token_is_always_allowed():
    found = generate(tiny_model(), TOKENIZER, PROMPTS, max_length=12)
    assert [len(answer.ids) for answer in found] == [max(1, 12 - len(prompt)) for prompt in PROMPTS]


def test_the_smaller_of_both_limits_wins():
    limits = [1, 2, 3, 4, 5, 6, 7]
    found = generate(tiny_model(), TOKENIZER, PROMPTS, max_length=12, max_new_tokens=limits)
    assert [len(answer.ids) for answer in found] == [
        max(1, min(12 - len(p), n)) for p, n in zip(PROMPTS, limits, strict=True)
    ]


def ending(model, prompt, place):
    """Make the model's greedy token at a place the end of sequence: swap two rows of the output layer."""
    token = greedy(model, prompt, place + 1)[place]
    with torch.no_grad():
        rows = model.lm_head.weight[[token, EOS]].clone()
        model.lm_head.weight[[EOS, token]] = rows
    return model


def test_answers_stop_at_the_end_of_sequence_and_do_not_hold_it():
    model = ending(tiny_model(), PROMPTS[2], 2)
    (answer,) = generate(model, TOKENIZER, [PROMPTS[2]], max_new_tokens=6)
    assert list(answer.ids) == greedy(model, PROMPTS[2], 6)
    assert len(answer.ids) <= 2
    (alone,) = generate(ending(tiny_model(), PROMPTS[2], 0), TOKENIZER, [PROMPTS[2]], max_new_tokens=6)
    assert (alone.ids, alone.text) == ((), "")


def test_padding_may_share_its_id_with_the_end_of_sequence():
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.pad_token = tokenizer.eos_token
    expected = generate(tiny_model(), TOKENIZER, PROMPTS, max_new_tokens=6)
    assert generate(tiny_model(), tokenizer, PROMPTS, max_new_tokens=6) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_context_length_is_never_exceeded(architecture):
    key = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    model = tiny_model(architecture, **{key: 20})
    found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=50)
    assert [len(answer.ids) for answer in found] == [20 - len(prompt) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert list(answer.ids) == greedy(model, prompt, 20 - len(prompt))


def test_the_models_own_sampling_settings_are_set_aside_and_come_back():
    model = tiny_model()
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 5.0, "max_length": 7}
    model.generation_config = own = GenerationConfig(eos_token_id=EOS, no_repeat_ngram_size=1, **settings)
    model.train()
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=6) == expected
    assert model.generation_config is own
    assert model.training


def test_wrapped_models_are_greedy_too():
    model = tiny_model()
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    model.generation_config = own = GenerationConfig(eos_token_id=EOS, repetition_penalty=5.0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert generate(wrapped, TOKENIZER, PROMPTS, max_new_tokens=6) == expected
    assert wrapped.get_base_model().generation_config is own


def test_missing_limits_and_empty_prompts_are_refused():
    with pytest.raises(ValueError, match="give max_length or max_new_tokens"):
        generate(tiny_model(), TOKENIZER, PROMPTS)
    with pytest.raises(ValueError, match="needs at least one token"):
        generate(tiny_model(), TOKENIZER, [[]], max_length=5)
    assert generate(tiny_model(), TOKENIZER, [], max_length=5) == []


def test_progress_counts_every_prompt():
    seen = []
    generate(tiny_model(), TOKENIZER, PROMPTS, max_new_tokens=2, batch_rows=3, progress=seen.append)
    assert seen == [3, 3, 1]
