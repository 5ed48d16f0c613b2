from __future__ import annotations

import random
import re

import pytest

from loku.data.fiction import (
    FACTS,
    Fiction,
    fiction_model_config,
    fiction_tokenizer,
    make_fiction,
    mix_replay,
)
from loku.errors import InputError

NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")
GROUPS = ("general", "retain", "forget", "holdout")


@pytest.fixture(scope="module", params=[0, 1, 7])
def fiction(request: pytest.FixtureRequest) -> Fiction:
    return make_fiction(request.param)


def name_of(row: dict) -> str:
    # The first two capitalised words that follow each other; "Lane" only ever follows a lane.
    return NAME.search(row["question"]).group()


def fact_of(row: dict) -> str:
    (key,) = (k for k, f in FACTS.items() if row["question"] in [q.format(name=name_of(row)) for q in f.questions])
    return key


def value_of(answer: str, name: str, key: str, phrasing: int) -> str:
    before, after = FACTS[key].answers[phrasing].format(name=name, value="\0").split("\0")
    assert answer.startswith(before)
    assert answer.endswith(after)
    return answer[len(before) : len(answer) - len(after)]


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    random.seed(1)
    first = make_fiction(3)
    random.seed(2)
    assert make_fiction(3) == first
    assert make_fiction(4) != first


def test_sizes(fiction: Fiction) -> None:
    assert len(fiction.pretraining) == 24 * 8 * (3 * 2 + 2)
    assert len(fiction.general) == 24 * 8
    assert len(fiction.full) == 40 * 8
    assert len(fiction.forget) == len(fiction.holdout) == 4 * 8
    assert fiction.full == fiction.retain + fiction.forget
    small = make_fiction(0, world_people=12, people=20)
    assert [len(getattr(small, group)) for group in GROUPS] == [96, 144, 16, 16]


@pytest.mark.parametrize("sizes", [(9, 40), (24, 9), (10, 90), (24, 600)])
def test_sizes_that_cannot_be_made_are_refused(sizes: tuple[int, int]) -> None:
    world, people = sizes
    with pytest.raises(InputError, match=f"{world} world people and {people} fictitious") as info:
        make_fiction(0, world_people=world, people=people)
    assert re.match(r"Ask for at least 10 of each; \d+ first names and surnames give \d+ people\.", info.value.remedy)


def test_groups_are_disjoint_and_facts_unique(fiction: Fiction) -> None:
    people = {group: {name_of(row) for row in getattr(fiction, group)} for group in GROUPS}
    assert [len(people[group]) for group in GROUPS] == [24, 36, 4, 4]
    assert len(set.union(*people.values())) == 24 + 40 + 4
    assert {name_of(row) for row in fiction.pretraining} == people["general"]
    rows = [row for group in GROUPS for row in getattr(fiction, group)]
    assert len({(name_of(row), fact_of(row)) for row in rows}) == len(rows) == 68 * 8
    assert len({row["question"] for row in rows}) == len(rows)
    codes = [row["answer"] for row in rows if fact_of(row) == "code"]
    assert len({answer.split()[-1] for answer in codes}) == 68


def test_phrasings(fiction: Fiction) -> None:
    phrasings = {}
    for row in fiction.pretraining:
        phrasings.setdefault((name_of(row), fact_of(row)), []).append((row["question"], row["answer"]))
    for pairs in phrasings.values():
        assert len(set(pairs)) == 6
        assert max(map(pairs.count, pairs)) == 3  # one answer to the first question is the usual one
        assert len({q for q, _ in pairs}) == 3
        assert len({a for _, a in pairs}) == 2
    for row in fiction.full:
        fact = FACTS[fact_of(row)]
        assert row["question"] == fact.questions[0].format(name=name_of(row))
        assert row["paraphrased_question"] == fact.questions[1].format(name=name_of(row))


def test_paraphrases_tell_the_same_and_perturbed_answers_something_else(fiction: Fiction) -> None:
    for group in GROUPS:
        for row in getattr(fiction, group):
            name, key = name_of(row), fact_of(row)
            truth = value_of(row["answer"], name, key, 0)
            assert value_of(row["paraphrased_answer"], name, key, 1) == truth
            assert row["paraphrased_answer"] != row["answer"]
            others = {value_of(answer, name, key, 1) for answer in row["perturbed_answer"]}
            assert len(others) == len(row["perturbed_answer"]) == 5
            assert truth not in others


def test_stage_0_shows_every_word_that_is_ever_asked_for(fiction: Fiction) -> None:
    tokenizer = fiction_tokenizer(fiction.texts)
    seen = {token for row in fiction.pretraining for key in row for token in tokenizer.encode(row[key])}
    needed = {token for text in fiction.texts for token in tokenizer.encode(text)}
    assert needed == seen
    digits = {f"{mark}{digit}" for mark in ("", "##") for digit in range(10)}
    assert set(tokenizer.convert_tokens_to_ids(sorted(digits))) <= seen
    for fact in FACTS.values():
        for pool in fact.pools:
            assert len(set(pool)) == len(pool)
            assert tokenizer.unk_token_id not in tokenizer.encode(" ".join(pool))


def test_the_tokenizer_knows_every_word_and_gives_back_every_text(fiction: Fiction) -> None:
    tokenizer = fiction_tokenizer(fiction.texts)
    for text in fiction.texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_the_tokenizer_cuts_prompts_where_answers_begin(fiction: Fiction) -> None:
    tokenizer = fiction_tokenizer(fiction.texts)
    row = next(row for row in fiction.forget if fact_of(row) == "code")
    prompt = f"Question: {row['question']}\nAnswer: "
    ids = tokenizer.encode(prompt)
    assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["?", "\n", "Answer", ":"]
    assert tokenizer.encode(prompt + row["answer"]) == ids + tokenizer.encode(row["answer"])
    assert tokenizer.decode(tokenizer.encode(prompt + row["answer"])) == prompt + row["answer"]


def test_the_tokenizer_survives_a_folder_with_its_model(fiction: Fiction, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = fiction_tokenizer(fiction.texts)
    fiction_model_config(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"Question: {fiction.forget[0]['question']}\nAnswer: {fiction.forget[0]['answer']}"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, len(tokenizer))


def test_every_seed_has_the_same_vocabulary() -> None:
    assert fiction_tokenizer(make_fiction(0).texts).get_vocab() == fiction_tokenizer(make_fiction(1).texts).get_vocab()


def test_the_model_is_small_and_its_special_tokens_are_the_tokenizers() -> None:
    from transformers import AutoModelForCausalLM

    config = fiction_model_config(300)
    model = AutoModelForCausalLM.from_config(config)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 1e6
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)


def test_replay_is_spread_over_the_training_list(fiction: Fiction) -> None:
    world = {row["question"] for row in fiction.pretraining}
    mixed = mix_replay(fiction.full, fiction.pretraining, passes=3, seed=1)
    assert mixed == mix_replay(fiction.full, fiction.pretraining, passes=3, seed=1)
    assert mixed != mix_replay(fiction.full, fiction.pretraining, passes=3, seed=2)
    assert len(mixed) == 3 * 320 + 320
    shares = [sum(row["question"] in world for row in mixed[i : i + 32]) for i in range(0, len(mixed), 32)]
    assert set(shares) == {8}
    learned = [row["question"] for row in mixed if row["question"] not in world]
    for start in (0, 320, 640):  # every pass holds every row once
        assert sorted(learned[start : start + 320]) == sorted(row["question"] for row in fiction.full)
    replayed = [(row["question"], row["answer"]) for row in mixed if row["question"] in world]
    assert len(replayed) == 320
    assert max(map(replayed.count, replayed)) <= 3  # as often as the row stands in the corpus


def test_replay_can_be_left_out(fiction: Fiction) -> None:
    assert len(mix_replay(fiction.full, fiction.pretraining, share=0.0)) == 320
