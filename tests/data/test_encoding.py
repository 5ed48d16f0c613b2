"""Answer-only labels: boundaries, ends of sequence, chats, windows of running text, and what is counted."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from builders import CORPUS, byte_level_tokenizer
from loku.data.encoding import IGNORE, Encoder, EncodingCounts
from loku.data.prompts import ChatTemplate, TagTemplate
from loku.data.records import Record, parse_rows
from loku.data.sources import load_records
from loku.errors import InputError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As templates of reasoning models do: only the last answer is kept whole.
STRIPS_EARLIER_TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][-3:] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPS_ANSWERS = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"


@cache
def metaspace_tokenizer(ends="<s> $A"):
    """SentencePiece's kind: blanks become a mark at the start of words; special tokens are put around a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def chatty(template=CHATML):
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "metaspace with a start": metaspace_tokenizer(),
    "metaspace with start and end": metaspace_tokenizer("<s> $A </s>"),
    "metaspace with an end": metaspace_tokenizer("$A </s>"),
}


def qa(question="Where was Mira Voss born?", answer="Mira Voss was born in Tarnhollow."):
    return Record(0, question, answer)


def supervised(example):
    return [label for label in example.labels if label != IGNORE]


def check(example):
    """What holds for every example."""
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert example.labels[0] == IGNORE  # nothing predicts it
    assert supervised(example)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_answer_and_the_end_are_supervised_and_nothing_else(name):
    tokenizer = TOKENIZERS[name]
    (example,) = Encoder(tokenizer, TagTemplate()).encode(qa())
    check(example)
    assert tokenizer.decode(supervised(example)).strip() == "Mira Voss was born in Tarnhollow." + tokenizer.eos_token
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length], skip_special_tokens=True)
    assert prompt == "Question: Where was Mira Voss born?\nAnswer:"
    assert example.prompt_length == example.generation_length == example.labels.index(supervised(example)[0])
    # One start where the tokenizer puts one, one end whether it puts one or not.
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids[-1] == tokenizer.eos_token_id
    starts = [i for i, token in enumerate(example.input_ids) if token == tokenizer.bos_token_id]
    assert starts == ([0] if "start" in name else [])


def test_the_leading_blank_belongs_to_the_answers_first_word():
    tokenizer = byte_level_tokenizer()
    (example,) = Encoder(tokenizer, TagTemplate()).encode(qa())
    assert tokenizer.convert_ids_to_tokens(supervised(example))[0] == "ĠMira"
    # The blank may stand in the completion as well as in the prompt.
    for prompt, completion in (("Question: Who? Answer:", " Odo Brill"), ("Question: Who? Answer: ", "Odo Brill")):
        encoded = Encoder(tokenizer, TagTemplate()).encode_records(
            parse_rows([{"prompt": prompt, "completion": completion}], "rows")
        )
        assert tokenizer.convert_ids_to_tokens(supervised(encoded.examples[0]))[0] == "ĠOdo"
        assert encoded.counts.shifted_boundaries == 0


def test_a_token_that_straddles_the_boundary_is_supervised_and_counted():
    tokenizer = byte_level_tokenizer()
    rows = [
        {"prompt": "The quick bro", "completion": "wn fox"},
        {"prompt": "Que", "completion": "stion: Where"},  # the very first token
        {"prompt": "The quick", "completion": " brown fox"},
    ]
    encoded = Encoder(tokenizer, TagTemplate()).encode_records(parse_rows(rows, "rows"))
    assert encoded.counts.shifted_boundaries == 2
    shown = [tokenizer.convert_ids_to_tokens(supervised(example)) for example in encoded.examples]
    assert shown[0] == ["Ġbrow", "n", "Ġfox", "<|endoftext|>"]  # "Ġb", "r", "o" stand alone in the prompt's own ids
    assert shown[1] == [":", "ĠWhere", "<|endoftext|>"]
    assert shown[2] == ["Ġbrow", "n", "Ġfox", "<|endoftext|>"]
    for example, row in zip(encoded.examples, rows, strict=True):
        check(example)
        assert tokenizer.decode(example.input_ids) == row["prompt"] + row["completion"] + "<|endoftext|>"
    assert [example.prompt_length for example in encoded.examples] == [2, 0, 2]


WORDS = st.lists(st.sampled_from(["Mira", "Voss", "brow", "n", "(then)", "ts!", "\n", " ", ":", "lazy", "Odo", '"']))
TEXTS = WORDS.map("".join).filter(str.strip) | WORDS.map(" ".join).filter(str.strip)


@given(prompt=TEXTS, answer=TEXTS, name=st.sampled_from(sorted(TOKENIZERS)))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_character_of_an_answer_is_left_unsupervised_whatever_the_boundary(prompt, answer, name):
    tokenizer = TOKENIZERS[name]
    encoded = Encoder(tokenizer, TagTemplate()).encode_records([Record(0, prompt, answer, verbatim=True)])
    (example,) = encoded.examples
    check(example)
    joint = tokenizer(prompt + answer, return_offsets_mapping=True)
    ids, offsets = list(joint["input_ids"]), list(joint["offset_mapping"])
    while ids[-1] == tokenizer.eos_token_id:
        ids.pop(), offsets.pop()
    assert example.input_ids == [*ids, tokenizer.eos_token_id]
    # By the characters that each token covers: an independent account of the boundary.
    boundary = len(prompt.rstrip(" "))
    cut = example.generation_length
    assert all(end <= boundary for _, end in offsets[:cut])
    if not encoded.counts.shifted_boundaries:
        assert all(start >= boundary or start == end for start, end in offsets[cut:])


def test_texts_are_encoded_jointly_not_piece_by_piece():
    tokenizer = byte_level_tokenizer()
    (example,) = Encoder(tokenizer, TagTemplate()).encode(qa())
    whole = tokenizer("Question: Where was Mira Voss born?\nAnswer: Mira Voss was born in Tarnhollow.")["input_ids"]
    assert example.input_ids == [*whole, tokenizer.eos_token_id]


def test_a_supervised_answer_tag():
    tokenizer = byte_level_tokenizer()
    plain = Encoder(tokenizer, TagTemplate()).encode(qa())[0]
    tagged = Encoder(tokenizer, TagTemplate(supervise_answer_tag=True)).encode(qa())[0]
    assert tagged.input_ids == plain.input_ids
    assert tagged.generation_length == plain.generation_length == plain.prompt_length
    extra = supervised(tagged)[: -len(supervised(plain))]
    assert tokenizer.decode(extra) == "Answer:"
    assert tagged.prompt_length == plain.prompt_length - len(extra)


def test_another_answer_and_another_question():
    tokenizer = byte_level_tokenizer()
    encoder = Encoder(tokenizer, TagTemplate())
    for_answer = encoder.encode_answer(qa(), "In Ulm.")
    assert for_answer == encoder.encode(qa(answer="In Ulm."))[0]
    assert encoder.encode_answer(qa(), "In Ulm.", "Where?") == encoder.encode(qa("Where?", "In Ulm."))[0]


def test_a_chat_template_renders_questions():
    tokenizer = chatty()
    (example,) = Encoder(tokenizer, ChatTemplate("Be brief.")).encode(qa("Who?", "Odo."))
    check(example)
    text = tokenizer.decode(example.input_ids)
    assert text == "<|system|>Be brief.<|endoftext|>\n<|user|>Who?<|endoftext|>\n<|assistant|>Odo.<|endoftext|>\n"
    # What the template ends a turn with is learnt; no other end is added.
    assert tokenizer.decode(supervised(example)) == "Odo.<|endoftext|>\n"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Odo."}]
    conversation = Encoder(tokenizer, ChatTemplate()).encode(parse_rows([{"messages": messages}], "rows")[0])
    assert conversation == Encoder(tokenizer, ChatTemplate()).encode(qa("Who?", "Odo."))


def test_prompt_and_completion_texts_are_used_as_they_are_even_with_a_chat_template():
    record = parse_rows([{"prompt": "Who?", "completion": " Odo."}], "rows")[0]
    (example,) = Encoder(chatty(), ChatTemplate("Be brief.")).encode(record)
    assert chatty().decode(example.input_ids) == "Who? Odo.<|endoftext|>"


def test_every_assistant_turn_of_a_conversation_is_supervised():
    tokenizer = chatty()
    turns = [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Odo."),
        ("user", "Where?"),
        ("assistant", "Ulm."),
    ]
    record = Record(0, messages=tuple(turns))
    (example,) = Encoder(tokenizer, ChatTemplate()).encode(record)
    check(example)
    assert tokenizer.decode(supervised(example)) == "Odo.<|endoftext|>\nUlm.<|endoftext|>\n"
    assert example.prompt_length == example.labels.index(supervised(example)[0])
    last = tokenizer.decode(example.input_ids[example.generation_length :])
    assert last == "Ulm.<|endoftext|>\n"
    other = Encoder(tokenizer, ChatTemplate()).encode_answer(record, "Oos.")
    assert tokenizer.decode(other.input_ids).endswith("<|user|>Where?<|endoftext|>\n<|assistant|>Oos.<|endoftext|>\n")
    # Turns after the last answer are not part of what is learnt.
    longer = Record(0, messages=(*turns, ("user", "Sure?")))
    assert Encoder(tokenizer, ChatTemplate()).encode(longer) == [example]


def test_a_template_that_strips_earlier_turns_is_refused_but_may_have_single_turns():
    encoder = Encoder(chatty(STRIPS_EARLIER_TURNS), ChatTemplate())
    turns = (("user", "Who?"), ("assistant", "Odo Brill."), ("user", "Where?"), ("assistant", "Ulm."))
    with pytest.raises(
        InputError,
        match=r"--data row 9: the tokenizer's chat template renders turn 4 differently once more turns follow\.\nGive",
    ):
        encoder.encode(Record(9, messages=turns), "--data")
    check(encoder.encode(Record(0, messages=turns[:2]))[0])


# Qwen3's, in short: the last answer gets an empty thinking block, and so does the prompt when thinking is off.
THINKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("record", [qa("Who?", "Odo."), Record(0, messages=(("user", "Who?"), ("assistant", "Odo.")))])
def test_an_empty_thinking_block_belongs_to_the_prompt(record):
    tokenizer = chatty(THINKS)
    (example,) = Encoder(tokenizer, ChatTemplate()).encode(record)
    check(example)
    assert tokenizer.decode(supervised(example)) == "Odo.<|endoftext|>\n"
    prompt = tokenizer.decode(example.input_ids[: example.generation_length])
    assert prompt == "<|user|>Who?<|endoftext|>\n<|assistant|><think>\n\n</think>\n\n"
    assert example.generation_length == example.prompt_length


REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def test_a_conversation_that_the_template_refuses_is_named():
    encoder = Encoder(chatty(REFUSES_SYSTEM), ChatTemplate())
    turns = (("user", "Who?"), ("assistant", "Odo."))
    check(encoder.encode(Record(7, messages=turns))[0])
    sentence = (
        r"--retain row 7: the tokenizer's chat template refuses the conversation \(System role not supported\)\.\n"
        r"Give the turns that it takes, another tokenizer\.chat_template, or tags by --prompt-template\."
    )
    with pytest.raises(InputError, match=sentence):
        encoder.encode(Record(7, messages=(("system", "Be brief."), *turns)), "--retain")
    with pytest.raises(InputError, match="--forget row 0: the tokenizer's chat template refuses"):
        Encoder(chatty(REFUSES_SYSTEM), ChatTemplate("Be brief.")).encode(qa())


def test_conversations_that_cannot_be_encoded_are_refused():
    with pytest.raises(
        InputError, match=r"--retain holds `messages`, but the tokenizer has no chat template\.\nSet tok"
    ):
        Encoder(byte_level_tokenizer(), TagTemplate()).encode(Record(0, messages=(("assistant", "a"),)), "--retain")
    with pytest.raises(InputError, match=r"--retain row 0 has no assistant turn\.\nGive one to each row\."):
        Encoder(chatty(), ChatTemplate()).encode(Record(0, messages=(("user", "a"),)), "--retain")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_level_tokenizer.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"The tokenizer has no end-of-sequence token\.\nSet one"):
        Encoder(tokenizer, TagTemplate())


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(InputError, match=r"--data holds no token to learn from\.\nGive rows with answers or text\."):
        Encoder(byte_level_tokenizer(), TagTemplate()).encode_records([], "--data")
    silent = Encoder(chatty(DROPS_ANSWERS), ChatTemplate(), 500)
    with pytest.raises(InputError, match="--forget holds no token to learn from"):
        silent.encode_records([qa()])


def test_a_row_without_an_answer_is_refused():
    with pytest.raises(InputError, match=r"--forget row 3 has no answer\.\nGive rows with a question and an answer\."):
        Encoder(byte_level_tokenizer(), TagTemplate()).encode(Record(3, question="Who?"))


def test_long_answers_are_cut_at_the_limit_and_counted():
    tokenizer = byte_level_tokenizer()
    rows = [qa(), qa("Who?", "Odo.")]
    whole = Encoder(tokenizer, TagTemplate()).encode_records(rows)
    length = len(whole.examples[0].input_ids)
    assert whole.counts.truncated == 0
    for limit in (length, length - 1, whole.examples[0].prompt_length + 1):
        cut = Encoder(tokenizer, TagTemplate(), limit).encode_records(rows)
        assert cut.examples[0].input_ids == whole.examples[0].input_ids[:limit]
        assert cut.examples[0].labels == whole.examples[0].labels[:limit]
        assert cut.examples[1] == whole.examples[1]
        assert cut.counts.truncated == (limit < length)
        assert cut.counts.supervised_tokens == whole.counts.supervised_tokens - (length - limit)
        check(cut.examples[0])


def test_a_conversation_cut_at_the_limit_is_counted():
    record = Record(0, messages=(("user", "Who?"), ("assistant", "Odo."), ("user", "Where?"), ("assistant", "Ulm.")))
    whole = Encoder(chatty(), ChatTemplate()).encode_records([record])
    cut = Encoder(chatty(), ChatTemplate(), whole.examples[0].prompt_length + 1).encode_records([record])
    assert (whole.counts.truncated, cut.counts.truncated) == (0, 1)
    assert len(supervised(cut.examples[0])) == 1


def test_a_prompt_that_fills_the_limit_is_refused():
    encoder = Encoder(byte_level_tokenizer(), TagTemplate(), 500)
    length = encoder.encode(qa())[0].prompt_length
    sentence = (
        rf"--retain row 4 has no answer token left: its prompt alone has {length} tokens, the limit is {length}\."
        r"\nRaise --max-length, or shorten the row\."
    )
    with pytest.raises(InputError, match=sentence):
        Encoder(byte_level_tokenizer(), TagTemplate(), length).encode(Record(4, qa().question, "In Ulm."), "--retain")


@given(
    words=st.lists(
        st.sampled_from(["Mira", "Voss", "paints,", "lighthouses", "0", "(then)", "lazy", "dogs."]),
        min_size=2,
        max_size=60,
    ),
    limit=st.integers(2, 40),
    text_eos=st.booleans(),
    name=st.sampled_from(sorted(TOKENIZERS)),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_windows_predict_every_token_but_the_first_exactly_once(words, limit, text_eos, name):
    tokenizer, record = TOKENIZERS[name], Record(7, text=" ".join(words))
    encoded = Encoder(tokenizer, TagTemplate(), limit, text_eos=text_eos).encode_records([record])
    ids = list(tokenizer(record.text)["input_ids"])
    if ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    ids += [tokenizer.eos_token_id] * text_eos
    predicted = []
    for place, example in enumerate(encoded.examples):
        check(example)
        assert len(example.input_ids) <= limit
        assert example.index == 7
        assert (example.prompt_length, example.generation_length) == (1, 1)
        assert supervised(example) == example.input_ids[1:]
        if place:
            assert example.input_ids[0] == encoded.examples[place - 1].input_ids[-1]
        predicted += supervised(example)
    assert [ids[0], *predicted] == ids
    count = len(encoded.examples)
    assert encoded.counts == EncodingCounts(1, count, int(count > 1), 0, len(ids) - 1, 0)


@pytest.mark.parametrize("text", ["a", "M"])
def test_a_text_of_one_token_is_refused(text):
    with pytest.raises(
        InputError, match=r"Row 5 is a text of 1 tokens: nothing in it can be predicted\.\nLeave it out"
    ):
        Encoder(byte_level_tokenizer(), TagTemplate()).encode(Record(5, text=text))


def test_everything_is_counted():
    tokenizer = chatty()
    records = [
        qa(),
        Record(1, "The quick bro", "wn fox", verbatim=True),
        Record(2, text="The quick brown fox jumps over the lazy dog. " * 6),
        Record(3, text="lazy dog"),
        Record(4, messages=(("user", "Who?"), ("assistant", "Odo Brill paints lighthouses at dusk. " * 3))),
    ]
    encoder = Encoder(tokenizer, TagTemplate(), 40)
    encoded = encoder.encode_records(records)
    assert encoded.name == "--forget"
    assert encoded.examples == [example for record in records for example in encoder.encode(record)]
    assert encoded.counts == EncodingCounts(
        rows=5,
        sequences=len(encoded.examples),
        windows_cut=1,
        truncated=1,
        supervised_tokens=sum(len(supervised(example)) for example in encoded.examples),
        shifted_boundaries=1,
    )
    assert encoded.counts.sequences == 4 + len(encoder.encode(records[2])) > 5
    assert [example.index for example in encoded.examples] == sorted(example.index for example in encoded.examples)
    assert encoder.encode_records(load_records([{"text": "lazy dog"}])).name == "rows in memory"
