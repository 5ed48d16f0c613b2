"""Token selection: spans find their tokens whatever the tokenizer and template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_level_tokenizer
from loku.data.encoding import IGNORE, Encoder
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.records import parse_rows
from loku.data.spans import select_spans
from loku.errors import InputError

ROW = {"question": "Where was Mira Voss born?", "answer": "Mira Voss was born in Tarnhollow, near Ulm."}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


def selected(row, template=None, **options):
    tokenizer = byte_level_tokenizer()
    encoder = Encoder(tokenizer, template or TagTemplate(), **options)
    (record,) = parse_rows([row], "rows")
    examples = select_spans(tokenizer, encoder.encode(record), record.forget_spans, row=0)
    texts = []
    for example in examples:
        kept = [i for i, w in zip(example.input_ids, example.token_weights, strict=True) if w]
        texts.append(tokenizer.decode(kept))
        assert len(example.weights) == len(example.input_ids)
        assert all(w == 0 for w, label in zip(example.token_weights, example.labels, strict=True) if label == IGNORE)
    return texts


def test_only_the_tokens_of_the_spans_count():
    (text,) = selected(ROW | {"forget_spans": ["Tarnhollow", "Ulm"]})
    assert text.replace(" ", "") == "TarnhollowUlm"


def test_the_name_in_the_question_is_not_selected():
    (text,) = selected(ROW | {"forget_spans": ["Mira Voss"]})
    assert text.strip() == "Mira Voss"


def test_every_occurrence_counts():
    (text,) = selected(ROW | {"answer": "Ulm, and Ulm again.", "forget_spans": "Ulm"})
    assert text.replace(" ", "") == "UlmUlm"


def test_chat_templates_and_verbatim_rows(monkeypatch):
    monkeypatch.setattr(byte_level_tokenizer(), "chat_template", CHAT)
    (text,) = selected(ROW | {"forget_spans": ["Tarnhollow"]}, ChatTemplate())
    assert text.strip() == "Tarnhollow"
    monkeypatch.undo()
    (text,) = selected({"prompt": "Born in", "completion": " Tarnhollow", "forget_spans": ["hollow"]})
    assert "hollow" in text


def test_windows_of_a_text_share_their_spans():
    texts = selected({"text": "one two three four five six seven eight " * 6, "forget_spans": ["five"]}, max_length=24)
    assert len(texts) > 2
    assert sum(text.count("five") for text in texts) >= 4


@pytest.mark.parametrize("length", range(16, 40))
def test_a_span_may_lie_across_the_border_of_two_windows(length):
    said = "Mira Voss counts the ships in the harbour of Tarnhollow and paints them at dusk"
    texts = selected({"text": said, "forget_spans": ["of Tarnhollow and"]}, max_length=length)
    assert "of Tarnhollow and" in "".join(texts)


def test_a_span_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"Row 0 has the span 'Paris' in `forget_spans`.*\nWrite spans exactly"):
        selected(ROW | {"forget_spans": ["Tarnhollow", "Paris"]})


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text("abcxyz éüß日本", min_size=1, max_size=8), min_size=1, max_size=6), data=st.data())
def test_the_selected_tokens_hold_the_span(words, data):
    answer = "x" + " ".join(words)
    start = data.draw(st.integers(0, len(answer) - 1))
    span = answer[start : start + 5]
    if not span.strip() or "�" in span:
        return
    (text,) = selected({"prompt": "p:", "completion": answer, "forget_spans": [span]})
    assert span in text or span.strip() in text
