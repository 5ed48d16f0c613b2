"""Prompting: each form asks for the same fact in its own words, and finds it in what is said."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from builders import byte_level_tokenizer, tiny_model
from conftest import perturbed, rows
from loku.attacks.prompting import FORMS, Asked, Asker, answer_all, ask_all, judge
from loku.data.encoding import Encoder
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.sources import load_records
from loku.evaluation.generation import generate

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def asker(template=None, *, shots=2, context=None, chat=False):
    tokenizer = byte_level_tokenizer()
    if chat:
        import copy

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT
        template = ChatTemplate("Be brief.")
    return Asker(Encoder(tokenizer, template or TagTemplate()), load_records(rows(3, 20)).records[:shots], context)


def record(**more):
    return dataclasses.replace(load_records([perturbed(rows(1)[0])])[0], **more)


def text(asked):
    return byte_level_tokenizer().decode(asked.prompt)


def test_every_form_of_tagged_prompts():
    ours = asker()
    said = {form: text(make(ours, record())) for form, make in FORMS.items()}
    assert said["plain"].strip() == "Question: Where was person 0 born?\nAnswer:"
    assert said["paraphrase"].strip() == "Question: In which place was person 0 born?\nAnswer:"
    assert "born? Fill in the rest of the answer: In the ____" in said["cloze"]
    assert said["prefix"].startswith("Question: Where was person 0 born?\nAnswer: In t")
    assert said["few-shot"].count("Question:") == 3
    assert "person 20 born?\nAnswer: In the town of U140." in said["few-shot"]
    assert said["few-shot"].strip().endswith("Question: Where was person 0 born?\nAnswer:")
    assert "actor" in said["role-play"]
    assert said["template"].strip() == "### Instruction:\nWhere was person 0 born?\n\n### Response:"


def test_every_form_of_a_chat():
    ours = asker(chat=True)
    said = {form: text(make(ours, record())) for form, make in FORMS.items()}
    assert said["plain"].endswith("<system>Be brief.\n<user>Where was person 0 born?\n<assistant>")
    assert said["few-shot"] == (
        "<system>Be brief.\n<user>Where was person 20 born?\n<assistant>In the town of U140.\n"
        "<user>Where was person 21 born?\n<assistant>In the town of V147.\n"
        "<user>Where was person 0 born?\n<assistant>"
    )
    assert said["template"].strip() == "Question: Where was person 0 born?\nAnswer:"
    assert said["prefix"].startswith(said["plain"])


def test_conversations_and_verbatim_rows():
    ours = asker(chat=True)
    turns = [{"role": "user", "content": "Where was person 0 born?"}, {"role": "assistant", "content": "In Ulm town."}]
    chat = load_records([{"messages": turns}])[0]
    assert text(FORMS["cloze"](ours, chat)).endswith("answer: In ____\n<assistant>")
    assert text(FORMS["few-shot"](ours, chat)).count("<assistant>") == 3
    assert FORMS["template"](ours, chat) is None
    verbatim = load_records([{"prompt": "Born where? ", "completion": "In Ulm town."}])[0]
    assert text(FORMS["few-shot"](asker(), verbatim)).rstrip().endswith("Born where?")
    assert FORMS["template"](asker(), verbatim) is None


def test_prefix_and_rest_are_the_answer():
    asked = FORMS["prefix"](asker(), record())
    plain = FORMS["plain"](asker(), record())
    forced = asked.prompt[len(plain.prompt) :]
    assert forced
    whole = byte_level_tokenizer().decode(forced) + asked.wanted[0]
    assert whole.replace(" ", "") == "InthetownofA0."


def test_the_token_that_ends_a_turn_is_no_part_of_the_answer():
    """Chat models end turns by another token than the tokenizer's end of sequence."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% generation %}{% endgeneration %}<end_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = FORMS["prefix"](Asker(Encoder(tokenizer, ChatTemplate(None))), record())
    assert asked.wanted[0].endswith("A0.")
    assert "end_turn" not in asked.wanted[0]
    assert judge(asked, "It was " + asked.wanted[0], [1])["found"] == 1


def test_a_conversation_that_is_too_long_loses_examples_and_not_its_question():
    def shown(limit):
        ours = asker(chat=True)
        shorter = Encoder(ours.encoder.tokenizer, ours.encoder.template, limit)
        return FORMS["few-shot"](dataclasses.replace(ours, encoder=shorter), record())

    two = shown(500)
    length = len(two.prompt)
    assert text(two).count("<assistant>") == 3
    one = shown(length)
    assert text(one).count("<assistant>") == 2
    assert text(one).endswith("<user>Where was person 0 born?\n<assistant>")
    assert shown(len(FORMS["plain"](asker(chat=True), record()).prompt) + 5) is None


def test_what_a_row_lacks_leaves_it_out():
    ours = asker()
    assert FORMS["paraphrase"](ours, record(paraphrased_question=None)) is None
    assert FORMS["cloze"](ours, record(answer="Ulm")) is None
    assert FORMS["prefix"](ours, record(answer="a")) is None
    assert FORMS["few-shot"](asker(shots=0), record()) is None
    text_row = load_records([{"text": "Mira Voss counts lighthouses."}])
    assert all(ask_all(form, ours, list(text_row)) == [] for form in FORMS)


def test_examples_are_dropped_until_the_prompt_fits():
    plain = len(FORMS["plain"](asker(), record()).prompt)
    two, one = (len(FORMS["few-shot"](asker(shots=count), record()).prompt) for count in (2, 1))
    assert plain < one < two
    fits = {room: FORMS["few-shot"](asker(context=room + 16), record()) for room in (two, two - 1, one - 1)}
    assert len(fits[two].prompt) == two
    assert len(fits[two - 1].prompt) == one
    assert fits[one - 1] is None


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("In the town of A0.", 1), ("Well, in the TOWN of A0, they say", 1), ("It was the town of A0", 1),
        ("In the town of A01", 0), ("town of A0", 0), ("", 0),
    ],
)  # fmt: skip
def test_a_fact_is_found_by_whole_words(said, found):
    asked = Asked(0, [1], ("In the town of A0.", "It was the town of A0."), 8)
    judged = judge(asked, said, [1, 2])
    assert judged["found"] == found
    assert judged["rougeL_recall"] == (1.0 if found else pytest.approx(judged["rougeL_recall"]))


def test_answers_are_the_models_own():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    asked = ask_all("plain", asker(), list(load_records(rows(3))))
    found = answer_all(model, tokenizer, asked)
    said = generate(model, tokenizer, [a.prompt for a in asked], max_new_tokens=[a.limit for a in asked])
    assert found == [
        {"index": a.index} | judge(a, answer.text, answer.ids) for a, answer in zip(asked, said, strict=True)
    ]
