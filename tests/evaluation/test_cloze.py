"""The next-word metric against greedy decoding and one model call a word, its slow and obvious forms."""

import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from loku.data.sources import load_records
from loku.errors import InputError
from loku.evaluation.cloze import measure_cloze

PROMPTS = ["The fox saw a dog, and the dog saw the", "Who wrote it?", "Odo Brill paints"]


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_accuracy_is_that_of_greedy_decoding():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    rows, expected = [], []
    for prompt in PROMPTS:
        said = tokenizer.decode(greedy(model, tokenizer, prompt, 2))
        for completion in (said, " zebra"):
            wanted = tokenizer(prompt + completion)["input_ids"][len(tokenizer(prompt)["input_ids"]) :]
            rows.append({"prompt": prompt, "completion": completion})
            expected.append(float(greedy(model, tokenizer, prompt, len(wanted)) == wanted))
    found = measure_cloze(model, tokenizer, load_records(rows), max_length=60)
    assert [row["accuracy"] for row in found.per_example] == expected
    assert found.mean("accuracy") == sum(expected) / len(expected)
    assert 0 < sum(expected) < len(expected)


def test_probability_is_the_geometric_mean_of_the_completions_tokens():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    found = measure_cloze(model, tokenizer, load_records([{"prompt": PROMPTS[0], "completion": " fox"}]), max_length=60)
    start = len(tokenizer(PROMPTS[0])["input_ids"])
    ids = torch.tensor([tokenizer(PROMPTS[0] + " fox")["input_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert found.mean("probability") == pytest.approx(logprobs[start - 1 :].mean().exp().item(), rel=1e-5)


def test_with_wrong_words_the_likeliest_must_be_the_right_one():
    model, tokenizer = tiny_model(), byte_level_tokenizer()
    words = [" fox", " dog", " cat", " owls"]

    def likely(prompt, word):
        start, ids = len(tokenizer(prompt)["input_ids"]), torch.tensor([tokenizer(prompt + word)["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return logprobs[start - 1 :].sum().item()

    rows, expected = [], []
    for prompt in PROMPTS:
        best = max(words, key=lambda word: likely(prompt, word))
        for word in words:
            rows.append({"prompt": prompt, "completion": word, "perturbed_answer": [w for w in words if w != word]})
            expected.append(float(word == best))
    found = measure_cloze(model, tokenizer, load_records(rows), max_length=60)
    assert [row["accuracy"] for row in found.per_example] == expected
    assert found.mean("accuracy") == 0.25


@pytest.mark.parametrize(
    "row", [{"text": "running text"}, {"question": "q", "answer": "a"}, {"prompt": "x " * 90, "completion": "y"}]
)
def test_rows_that_ask_for_no_last_word_are_refused(row):
    with pytest.raises(InputError) as error:
        measure_cloze(tiny_model(), byte_level_tokenizer(), load_records([row]), max_length=60)
    assert error.value.remedy
