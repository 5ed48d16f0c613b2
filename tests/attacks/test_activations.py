"""Activations: ranks by layer against a plain computation, and a probe that finds what is there and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders import byte_level_tokenizer, tiny_model
from conftest import rows
from loku.attacks import activations
from loku.attacks.activations import Lens, facts, features, final_norm, lens, probe, spread
from loku.data.encoding import Encoder
from loku.data.prompts import TagTemplate
from loku.data.sources import load_records
from loku.errors import InputError

TOKENIZER = byte_level_tokenizer()
ENCODER = Encoder(TOKENIZER, TagTemplate())


def made(model, count=6, start=0):
    return facts(model, TOKENIZER, ENCODER, list(load_records(rows(count, start))))


def test_facts_leave_out_the_prompt_the_end_and_what_all_answers_share():
    model = tiny_model()
    few, many = made(model, 6), made(model, 12)
    for row in (*few, *many):
        asked = row.example.input_ids[: row.example.prompt_length]
        assert row.places
        assert not set(row.tokens) & {*asked, TOKENIZER.eos_token_id}
        assert row.places[0] >= row.example.prompt_length
    assert len(few[3].places) > len(many[3].places)
    shared = set.intersection(*(set(row.tokens) for row in few))
    assert shared
    assert not any(set(row.tokens) & shared for row in many)


def test_running_text_counts_every_token_of_its_first_window():
    text = list(load_records([{"text": "Mira Voss counts lighthouses at dusk."}]))
    (row,) = facts(tiny_model(), TOKENIZER, ENCODER, text)
    assert row.places == list(range(1, len(row.example.input_ids)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "gpt_neox", "gpt_neo", "qwen3", "gemma3_text"])
def test_ranks_are_those_of_norm_and_head(architecture):
    model = tiny_model(architecture)
    found = lens(model, TOKENIZER, made(model))
    norm, head = final_norm(model), model.get_output_embeddings()
    for row, seen in zip(made(model), found, strict=True):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row.example.input_ids]), output_hidden_states=True)
            states = [head(norm(layer)) for layer in output.hidden_states[1:-1]] + [output.logits]
        assert seen.ranks.shape == (2, len(row.places))
        for layer, logits in zip(seen.ranks, states, strict=True):
            for rank, place in zip(layer, row.places, strict=True):
                right = float(logits[0, place - 1, row.example.input_ids[place]])
                # padding beside longer rows moves logits by rounding: nearly equal ones may swap
                near = (
                    int((logits[0, place - 1] > right - 1e-4).sum()),
                    int((logits[0, place - 1] > right + 1e-4).sum()),
                )
                assert near[1] + 1 <= rank <= max(near[0], 1)


def test_depth_says_how_early_a_token_is_first():
    found = Lens(3, np.array([[1, 4, 9, 2], [2, 1, 9, 2], [1, 1, 9, 1]]))
    assert found.depth() == pytest.approx((1 + 2 / 3 + 0 + 1 / 3) / 4)
    numbers = found.numbers()
    assert numbers["any_layer"] == 0.75
    assert numbers["reciprocal_rank"] == pytest.approx((1 + 1 + 1 / 9 + 1) / 4)
    assert [numbers[f"hits_{layer}"] for layer in (1, 2, 3)] == [0.25, 0.25, 0.75]


def test_models_without_a_lens_are_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(activations, "lm_head_of", lambda model: "it has no head")
    with pytest.raises(InputError, match="no logit lens on this model: it has no head"):
        lens(model, TOKENIZER, made(model))
    model.model.norm = torch.nn.Identity()
    with pytest.raises(InputError, match="final norm"):
        final_norm(model)


def test_layers_are_spread_evenly():
    assert spread(3) == [1, 2, 3]
    assert spread(8) == list(range(1, 9))
    assert len(spread(32)) == 8
    assert spread(32)[-1] == 32


def test_features_are_the_states_before_each_token():
    model = tiny_model()
    ours = made(model)
    layers, states, tokens, owners = features(model, TOKENIZER, ours)
    assert layers == [1, 2]
    assert states.shape == (len(tokens), 2, 32)
    row = ours[4]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([row.example.input_ids]), output_hidden_states=True)
    expected = torch.stack([output.hidden_states[layer][0, [p - 1 for p in row.places]] for layer in layers], dim=1)
    assert np.allclose(states[owners == 4], expected.numpy(), atol=1e-4)
    assert tokens[owners == 4].tolist() == row.tokens


def planted(monkeypatch, readable):
    """States in which the next token is readable at layer 2 only, or nowhere."""

    def made_features(model, tokenizer, given):
        draw = np.random.default_rng(len(given))
        tokens = np.concatenate([row.tokens for row in given])
        owners = np.concatenate([[place] * len(row.places) for place, row in enumerate(given)])
        states = draw.normal(size=(len(tokens), 2, 40)).astype(np.float32)
        if readable:
            codes = np.random.default_rng(0).normal(size=(5000, 40))
            states[:, 1] += 4 * codes[tokens]
        return [1, 2], states, tokens, owners

    monkeypatch.setattr(activations, "features", made_features)


@pytest.mark.parametrize("readable", [True, False])
def test_the_probe_reads_what_is_there(monkeypatch, readable):
    planted(monkeypatch, readable)
    model = tiny_model()
    ours, known = made(model, 8), made(model, 24, start=30)
    found = probe(model, TOKENIZER, ours, known)
    assert [row["index"] for row in found] == list(range(8))
    means = {layer: np.mean([row[f"layer_{layer}"] for row in found]) for layer in (1, 2)}
    assert means[1] < 0.5
    assert (means[2] > 0.7) if readable else (means[2] < 0.5)


def test_a_row_is_never_judged_by_a_probe_that_saw_it(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    model = tiny_model()
    ours, known = made(model, 8), made(model, 8, start=30)
    seen = []
    plain = LogisticRegression.fit

    def fit(self, X, y, *rest):
        seen.append(len(y))
        return plain(self, X, y, *rest)

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    probe(model, TOKENIZER, ours, known, folds=4)
    tokens, others = (sum(len(row.places) for row in side) for side in (ours, known))
    assert len(seen) == 2 * 4
    assert sum(seen[:4]) == 3 * tokens + 4 * others  # every token was left out exactly once


def test_a_probe_needs_rows():
    model = tiny_model()
    with pytest.raises(InputError, match="two forget rows"):
        probe(model, TOKENIZER, made(model, 1), made(model, 5))
