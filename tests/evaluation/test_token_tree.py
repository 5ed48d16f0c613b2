"""Token trees: which sequences merge, what a node sees, and scores equal to those of whole sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Example
from loku.evaluation import token_tree
from loku.evaluation.passes import Reading, reading_of
from loku.evaluation.scoring import predicting_ids, score
from loku.evaluation.token_tree import Tree, TreeSupport, ancestor_mask, grow_trees, tree_batch, tree_support
from loku.losses.lm_head import lm_head_of

PAD, EOS = byte_level_tokenizer().pad_token_id, byte_level_tokenizer().eos_token_id
ANY = TreeSupport(longest=None, balance=10_000)


def sharp(architecture, **settings):
    """A tiny model whose predictions depend on what it attends to: its matrices are large."""
    model = tiny_model(architecture, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def candidates(seed, answers=5):
    """One question with several answers that begin alike, one of them twice."""
    draw = random.Random(seed)

    def ids(least, most):
        return [draw.randrange(2, 300) for _ in range(draw.randint(least, most))]

    prompt, common = ids(5, 12), ids(3, 8)
    made = []
    for number in range(answers):
        answer = [*common[: draw.randint(0, len(common))], *ids(1, 4), EOS]
        made.append(Example(seed * 10 + number, prompt + answer, [IGNORE] * len(prompt) + answer, len(prompt), 5))
    return [*made, made[1]]


EXAMPLES = [example for seed in range(4) for example in candidates(seed)]
random.Random(0).shuffle(EXAMPLES)


def grown(*sequences, support=ANY):
    return grow_trees([list(sequence) for sequence in sequences], support)


def seen(tree):
    """By definition: each node's sequence up to itself."""
    return [[tree.ids[j] for j in range(len(tree)) if j <= i <= tree.lasts[j]] for i in range(len(tree))]


def test_a_tree_holds_every_sequence_once():
    (tree,) = grown("abcd", "abx", "ab", "abce", "abcd", "zz")[:1]
    assert "".join(tree.ids) == "abcdex"
    assert tree.depths == [0, 1, 2, 3, 3, 2]
    assert tree.lasts == [5, 5, 4, 3, 4, 5]
    assert tree.members == [2, 0, 4, 3, 1]  # lexicographic order
    assert ["".join(tree.ids[node] for node in path) for path in tree.paths] == ["ab", "abcd", "abcd", "abce", "abx"]
    assert ["".join(prefix) for prefix in seen(tree)] == ["a", "ab", "abc", "abcd", "abce", "abx"]


def test_random_trees_hold_their_sequences_and_see_their_ancestors():
    draw = random.Random(3)
    sequences = [[draw.randrange(3) for _ in range(draw.randint(1, 7))] for _ in range(60)]
    trees = grow_trees(sequences, ANY)
    assert sorted(member for tree in trees for member in tree.members) == list(range(60))
    assert sum(map(len, trees)) < sum(map(len, sequences)) / 2
    for tree in trees:
        prefixes = seen(tree)
        assert tree.is_chain == all(last == len(tree) - 1 for last in tree.lasts)
        for member, path in zip(tree.members, tree.paths, strict=True):
            assert prefixes[path[-1]] == sequences[member] == [tree.ids[node] for node in path]
            assert [tree.depths[node] for node in path] == list(range(len(path)))
        mask = ancestor_mask(torch.tensor([tree.lasts]), torch.float32)[0, 0]
        for node, prefix in enumerate(prefixes):
            assert [tree.ids[j] for j in (mask[node] == 0).nonzero().flatten()] == prefix


def test_sequences_merge_only_where_it_pays_and_within_the_window():
    long = [list(range(20)) + [50 + k] * 5 for k in range(3)]
    assert len(grown(*long)) == 1
    assert len(grown(*long, support=None)) == 3
    assert len(grown(*long, support=TreeSupport(longest=30, balance=10_000))) == 2
    assert len(grown(*long, support=TreeSupport(longest=29, balance=10_000))) == 3
    assert len(grown([1, *range(2, 20)], [1, *range(30, 50)], support=TreeSupport(None, 100))) == 2  # one shared token
    assert len(grown([1, *range(2, 20)], [1, *range(30, 50)], support=TreeSupport(None, 10_000))) == 1
    assert grow_trees([], ANY) == []


def test_chains_have_an_ordinary_mask_and_padding_sees_itself():
    chains = grown("abc", "abcd", "xy", support=TreeSupport(None, 1))
    batch = tree_batch([Tree([1, 2], [0, 1], [1, 1], [0], [[0, 1]])] * 2, 9, torch.float32)
    assert [tree.is_chain for tree in chains] == [True] * len(chains)
    assert set(batch) == {"input_ids", "attention_mask"}
    fork = Tree()
    for place, sequence in enumerate(([1, 2], [1, 3])):
        fork.add(place, sequence)
    batch = tree_batch([fork, Tree([7], [0], [0], [0], [[0]])], 9, torch.float64)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    mask = batch["attention_mask"]
    assert mask.dtype == torch.float64
    assert (mask[:, 0] == 0).int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]


def assert_equal(found, expected, atol):
    for got, want in zip(found, expected, strict=True):
        assert (got.index, got.tokens, got.answer) == (want.index, want.tokens, want.answer)
        assert got.nll == pytest.approx(want.nll, rel=1e-5, abs=atol)
        assert got.entropy == pytest.approx(want.entropy, rel=1e-5, abs=atol)
        np.testing.assert_array_equal(got.hits, want.hits)
        for name in ("logprobs", "means", "variances"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tree_scores_are_those_of_whole_sequences(architecture):
    model, double = sharp(architecture), sharp(architecture).double()
    reading = reading_of(model)
    assert reading.reason is None
    trees = grow_trees([predicting_ids(example) for example in EXAMPLES], reading.trees)
    assert sum(map(len, trees)) < 0.65 * sum(len(example.input_ids) for example in EXAMPLES)
    found = score(model, EXAMPLES, pad_id=PAD, batch_tokens=200)
    assert_equal(found, score(model, EXAMPLES, pad_id=PAD, reading=Reading()), 1e-5)
    assert_equal(found, score(double, EXAMPLES, pad_id=PAD, reading=Reading(), batch_tokens=1), 1e-5)
    assert_equal(found, score(model, EXAMPLES, pad_id=PAD, batch_tokens=10_000), 5e-6)


@pytest.mark.parametrize(("architecture", "window"), [("gpt_neo", "window_size"), ("gemma3_text", "sliding_window")])
def test_trees_stay_within_attention_windows(architecture, window):
    model = sharp(architecture, **{window: 28})
    reading = reading_of(model)
    assert reading.trees.longest == 28
    long = [Example(8, [*range(2, 42)], [IGNORE] * 9 + [*range(11, 42)], 9, 9)] * 2  # beyond the window, unmerged
    found = score(model, [*EXAMPLES, *long], pad_id=PAD, reading=reading)
    double = sharp(architecture, **{window: 28}).double()
    assert_equal(found, score(double, [*EXAMPLES, *long], pad_id=PAD, reading=Reading(), batch_tokens=1), 1e-5)


def test_too_small_windows_mean_no_trees():
    model = sharp("mistral", sliding_window=8)
    reading = reading_of(model)
    assert reading.head is not None
    assert reading.reason == "its attention window of 8 tokens is too small for trees"


def test_the_check_finds_wrong_masks_and_wrong_positions(monkeypatch):
    model = sharp("llama")
    head = lm_head_of(model)
    whole = token_tree.tree_batch

    def broken(change):
        def batch(trees, pad_id, dtype):
            made = whole(trees, pad_id, dtype)
            return made if all(tree.is_chain for tree in trees) else change(made)

        return batch

    for change in (
        lambda made: made | {"attention_mask": torch.zeros_like(made["attention_mask"])},
        lambda made: made | {"attention_mask": torch.ones_like(made["input_ids"])},
        lambda made: {name: value for name, value in made.items() if name != "position_ids"},
    ):
        monkeypatch.setattr(token_tree, "tree_batch", broken(change))
        assert "its hidden states on a token tree are not those of the sequences" in tree_support(model, head)
    monkeypatch.setattr(token_tree, "tree_batch", broken(lambda made: 1 / 0))
    assert tree_support(model, head) == "the check of its attention failed (ZeroDivisionError: division by zero)"


def test_half_precision_and_adapters_take_trees_too():
    model = sharp("llama").bfloat16()
    assert reading_of(model).reason is None
    wrapped = get_peft_model(sharp("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert reading_of(wrapped).reason is None
    found = score(wrapped, EXAMPLES, pad_id=PAD)
    assert_equal(found, score(wrapped, EXAMPLES, pad_id=PAD, reading=Reading(), batch_tokens=1), 1e-5)


def test_a_model_without_a_plain_head_is_read_by_its_logits():
    class Scaled(nn.Module):
        """Multiplies what the head makes: the head alone no longer tells the logits."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def get_output_embeddings(self):
            return self.model.get_output_embeddings()

        def forward(self, **inputs):
            output = self.model(**inputs)
            output.logits = output.logits * 2
            return output

    model = Scaled(sharp("llama"))
    assert "they are scaled or changed afterwards" in reading_of(model).reason
    doubled = sharp("llama")
    with torch.no_grad():
        doubled.lm_head.weight.mul_(2)
    assert_equal(score(model, EXAMPLES, pad_id=PAD), score(doubled, EXAMPLES, pad_id=PAD), 1e-5)
