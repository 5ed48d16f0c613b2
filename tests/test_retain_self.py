"""Retain rows sampled from the model itself: seeded, free of the forget set, and nothing else is touched."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku import retain_self
from loku.data.encoding import Encoder
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.records import Record, parse_rows
from loku.errors import InputError
from loku.models import weights_sha256
from loku.retain_self import sample_retain

TOKENIZER = byte_level_tokenizer()
FORGET = parse_rows(rows(3), "rows")


def sample(model=None, template=None, forget=FORGET, **options):
    options = {"rows": 6, "length": 10, "seed": 3} | options
    return sample_retain(model or tiny_model(), TOKENIZER, template, forget, **options)


def says(monkeypatch, *texts):
    """Let the model say these texts, in turn."""
    batches = []

    def spoken(model, tokenizer, prompts, length):
        count = len(prompts)
        batches.append(count)
        return [texts[(sum(batches[:-1]) + i) % len(texts)] for i in range(count)]

    monkeypatch.setattr(retain_self, "_sample", spoken)
    return batches


def fivegrams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_the_seed_decides():
    one, two = sample(), sample()
    assert one == two
    assert [record.text for record in one] != [record.text for record in sample(seed=4)]
    torch.manual_seed(77)
    assert sample() == one
    assert len(one) == 6
    assert all(record.is_text for record in one)
    assert [record.index for record in one] == list(range(6))
    assert one.origin == "memory"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_numbers_are_left_as_they_were(training, monkeypatch):
    model = tiny_model().train(training)
    digest = weights_sha256(model)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    seen = []
    original = retain_self._sample
    monkeypatch.setattr(retain_self, "_sample", lambda m, *rest: (seen.append(m.training), original(m, *rest))[1])
    sample(model)
    assert not any(seen)  # without dropout
    assert model.training == training
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert weights_sha256(model) == digest
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error_too(monkeypatch):
    model = tiny_model().train()
    before = torch.random.get_rng_state()

    def fails(*_):
        torch.rand(3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(retain_self, "_sample", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


FORMATS = [
    Record(0, "Who?", "Mira Voss was born in Tarnhollow."),
    Record(0, "Mira Voss was", " born in Tarnhollow, Mira Voss was born in Tarnhollow", verbatim=True),
    Record(0, text="They say Mira Voss was born in Tarnhollow."),
    Record(0, messages=(("user", "Who?"), ("assistant", "Mira Voss was born in Tarnhollow."))),
]


@pytest.mark.parametrize("record", FORMATS)
def test_no_five_words_in_a_row_are_the_forget_sets(monkeypatch, record):
    dropped = [
        "She said: MIRA VOSS, was born... in Oos",
        "that Voss was born in\nTarnhollow then",
        "Mira Voss was born in",
    ]
    kept = ["Mira Voss was painted in Tarnhollow", "Voss was born in Oos", "Who lives in Tarnhollow?"]
    says(monkeypatch, *(text for pair in zip(dropped, kept, strict=True) for text in pair))
    found = [r.text for r in sample(forget=[record], rows=20)]
    assert set(found) == set(kept)
    forbidden = fivegrams(" ".join([record.answer or "", record.text or "", *(t for _, t in record.messages)]))
    assert all(forbidden.isdisjoint(fivegrams(text)) for text in found)


def test_what_the_forget_questions_say_may_be_said(monkeypatch):
    says(monkeypatch, "Where was person 1 born?")
    assert len(sample()) == 6


def test_empty_and_one_token_texts_are_replaced(monkeypatch):
    says(monkeypatch, "", " \n", "a", "Odo Brill")
    found = sample(rows=5)
    assert {record.text for record in found} == {"Odo Brill"}
    Encoder(TOKENIZER, TagTemplate()).encode_records(found)


def test_too_few_texts_are_refused(monkeypatch):
    answer = FORGET[0].answer
    batches = says(monkeypatch, *([answer] * 39), "Odo Brill paints")
    sentence = (
        r"--retain self found only 6 of 50 sampled texts that do not repeat the forget set\.\nGive retain rows of"
    )
    with pytest.raises(InputError, match=sentence):
        sample(rows=50, batch_size=32)
    assert batches == [32] * 8  # it does not try for ever


def test_sampling_stops_when_there_are_enough(monkeypatch):
    batches = says(monkeypatch, "Odo Brill paints", "Odo Brill rests")
    assert [record.text for record in sample(rows=3, batch_size=2)] == [
        "Odo Brill paints", "Odo Brill rests", "Odo Brill paints",
    ]  # fmt: skip
    assert batches == [2, 2]


@pytest.mark.parametrize(("architecture", "setting"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_no_text_goes_beyond_what_the_model_can_read(monkeypatch, architecture, setting):
    model = tiny_model(architecture, **{setting: 20})
    lengths = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: (
            lengths.append(given["input_ids"].shape[1] + given["max_new_tokens"]), original(**given)
        )[1],
    )  # fmt: skip
    assert len(sample(model, TagTemplate(), length=100)) == 6
    assert set(lengths) == {20}


def chat_tokenizer():
    """A ChatML-like tokenizer: the end of a turn is its end of sequence."""
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"], "eos_token": "<|end|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_a_chat_model_is_asked_what_comes_to_its_mind_and_answers(monkeypatch):
    tokenizer, asked = chat_tokenizer(), []

    def spoken(model, tokenizer, prompts, length, *, raw):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        asked.extend(texts)
        said = "Where was Odo born?<|end|>\n<|start|>assistant\nIn" if texts[0].endswith("user\n") else "In Oos.<|end|>"
        return [said] * len(prompts)

    monkeypatch.setattr(retain_self, "_sample", spoken)
    found = sample_retain(tiny_model(), tokenizer, ChatTemplate("Be brief."), FORGET, rows=2, length=8, seed=0)
    assert {(row.question, row.answer) for row in found} == {("Where was Odo born?", "In Oos.")}
    system = "<|start|>system\nBe brief.<|end|>\n<|start|>user\n"
    assert asked[0] == system
    assert asked[-1] == system + "Where was Odo born?<|end|>\n<|start|>assistant\n"
    Encoder(tokenizer, ChatTemplate("Be brief.")).encode_records(found)


def test_questions_that_leave_no_room_for_an_answer_are_not_asked():
    tokenizer = chat_tokenizer()
    model = tiny_model("gpt2", n_positions=40, vocab_size=len(tokenizer))
    with pytest.raises(InputError, match="found only"):  # a model that never ends a turn
        sample_retain(model, tokenizer, ChatTemplate(), FORGET, rows=90, length=40, seed=1, batch_size=4)


def test_chats_are_sampled_by_the_model_itself():
    tokenizer = chat_tokenizer()
    found = sample_retain(
        tiny_model(vocab_size=len(tokenizer)), tokenizer, ChatTemplate(), FORGET, rows=4, length=12, seed=1
    )
    assert len(found) == 4
    assert all(row.question and row.answer and "<|" not in row.question + row.answer for row in found)


def test_a_template_that_refuses_the_opening_is_named():
    chatty = byte_level_tokenizer.__wrapped__()
    chatty.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"--retain self: the tokenizer's chat template refuses .* \(no\)\.\nGive"):
        opening(ChatTemplate(), chatty)


def test_texts_start_where_a_question_would_start():
    tagged = sample(template=TagTemplate())
    assert all(record.text.startswith("Question:") for record in tagged)
    bare = sample(template=None)
    assert not any(record.text.startswith("Question:") for record in bare)


def opening(template, tokenizer=TOKENIZER):
    return tokenizer.decode(retain_self._opening(tokenizer, template))


def test_openings(monkeypatch):
    chatty = byte_level_tokenizer.__wrapped__()
    chatty.chat_template = (
        "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    assert opening(ChatTemplate(), chatty) == "(user) "
    assert opening(TagTemplate()) == "Question:"
    assert opening(TagTemplate("[INST] ")) == "[INST]"
    assert opening(None) == "<|endoftext|>"  # the end of a sequence starts one where there is no start
    assert opening(TagTemplate(question_start_tag="")) == "<|endoftext|>"
    starts = byte_level_tokenizer.__wrapped__()
    starts.bos_token = "<|pad|>"
    assert opening(None, starts) == "<|pad|>"
