"""Activations: is a fact still readable inside the model? A logit lens, and a linear probe on hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loku.data.batching import pad_batch
from loku.data.encoding import IGNORE, Encoder, Example
from loku.data.records import Record
from loku.errors import InputError
from loku.evaluation.metrics import Array
from loku.evaluation.modes import end_ids, evaluating
from loku.evaluation.scoring import BATCH_TOKENS_CPU, length_batches
from loku.forward import decoder_layers
from loku.losses.lm_head import HeadSpec, lm_head_of, unwrapped

FOLDS = 4
COMMON = 0.2  # tokens in more than this share of a set's answers are its manner of speaking, not its facts
STRENGTH = 1.0  # inverse regularisation of the probe, scikit-learn's C
LAYERS = 8  # at most so many are probed, evenly spread, the last among them
TOKENS = 2000  # and at most so many known tokens trained on


@dataclass(frozen=True)
class Fact:
    """A row as an example, and the places of those tokens of its answer that carry the fact."""

    index: int
    example: Example
    places: list[int]

    @property
    def tokens(self) -> list[int]:
        """The ids at the places."""
        return [self.example.input_ids[place] for place in self.places]


def facts(model: nn.Module, tokenizer: Any, encoder: Encoder, records: Sequence[Record]) -> list[Fact]:
    """Return rows with the tokens of their answers that carry the fact.

    Left out are ends of sequence, tokens that stand in the prompt, and tokens that more than a fifth of the set's
    answers share (in sets of 10 rows or more). A row of which nothing is left keeps all answer tokens; of running text
    the first window counts, with every token.
    """
    ends = end_ids(model, tokenizer)
    examples = [encoder.encode(record, "--forget")[0] for record in records]
    answers = [_answer(example, ends) for example in examples]
    shared = Counter(
        token for example, places in zip(examples, answers, strict=True)
        for token in {example.input_ids[place] for place in places}
    )  # fmt: skip
    most = COMMON * len(examples) if len(examples) >= 10 else len(examples)
    found = []
    for record, example, places in zip(records, examples, answers, strict=True):
        asked = set() if record.is_text else set(example.input_ids[: example.prompt_length])
        kept = [
            place for place in places
            if record.is_text or (example.input_ids[place] not in asked and shared[example.input_ids[place]] <= most)
        ]  # fmt: skip
        found.append(Fact(record.index, example, kept or places))
    return found


@dataclass(frozen=True)
class Lens:
    """What a logit lens sees of one row: for each layer and answer token the rank of the right token, 1 the first."""

    index: int
    ranks: NDArray[np.int64]  # (layers, tokens)

    def depth(self) -> float:
        """Return how early the right token is the first choice: mean over tokens of 1 - (l - 1) / L, 0 where never.

        l is the first of the L layers where it is. 1 says from the first layer on, 1 / L at the last only.
        """
        first = self.ranks == 1
        layers = len(self.ranks)
        return float(np.where(first.any(axis=0), 1 - first.argmax(axis=0) / layers, 0.0).mean())

    def numbers(self) -> dict[str, float]:
        """Return the row's numbers: depth, the share of tokens that any layer puts first, and the mean over tokens of
        the best layer's 1 / rank; by layer, `hits_<l>`, the share of tokens that the layer puts first.
        """
        first = self.ranks == 1
        values = {
            "depth": self.depth(),
            "any_layer": float(first.any(axis=0).mean()),
            "reciprocal_rank": float((1.0 / self.ranks.min(axis=0)).mean()),
        }
        layers = {f"hits_{layer + 1}": float(hits.mean()) for layer, hits in enumerate(first)}
        return {"index": self.index} | values | layers


def lens(model: nn.Module, tokenizer: Any, rows: Sequence[Fact]) -> list[Lens]:
    """Read the state after every decoder layer through the model's final norm and head (the logit lens).

    Raises InputError for a model whose head or final norm cannot be told (`lm_head_of`, `final_norm`).
    """
    head = lm_head_of(model)
    if isinstance(head, str):
        raise InputError(f"There is no logit lens on this model: {head}.", "Leave this attack out.")
    norm = final_norm(model)
    found: dict[int, Lens] = {}
    with torch.no_grad(), evaluating(model):
        for place, states in _states(model, tokenizer, rows):
            chosen = torch.tensor(rows[place].tokens, device=states[0].device)
            through = [norm(layer) for layer in states[1:-1]] + [states[-1]]
            ranks = torch.stack([_ranks(head, layer, chosen) for layer in through])
            found[place] = Lens(rows[place].index, ranks.cpu().numpy())
    return [found[place] for place in range(len(rows))]


def _ranks(head: HeadSpec, states: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each label among all tokens, 1 + the number of tokens that are likelier."""
    logits = head.module(states).float()
    return 1 + (logits > logits.gather(1, labels.unsqueeze(1))).sum(dim=1)


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm between the last decoder layer and the head, found beside the layers and checked by a pass.

    Raises InputError when the states that the model gives as its last are not this norm of the last layer's output.
    """
    base = unwrapped(model)
    layers = decoder_layers(base)
    owner = next(part for part in base.modules() if any(child is layers for child in part.children()))
    norms = [child for child in owner.children() if "norm" in type(child).__name__.lower()]
    if norms:
        caught: list[Tensor] = []
        handle = layers[-1].register_forward_hook(
            lambda _, __, output: caught.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            with torch.no_grad(), evaluating(model):
                ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
                last = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
                if torch.allclose(norms[-1](caught[-1]).float(), last.float(), rtol=1e-3, atol=1e-4):
                    return norms[-1]
        finally:
            handle.remove()
    raise InputError(
        f"The final norm of {type(base).__name__} cannot be told: there is no logit lens on it.",
        "Leave this attack out.",
    )


def _answer(example: Example, ends: Sequence[int]) -> list[int]:
    """Return the places of the answer's tokens, without an end of sequence unless it is all there is."""
    places = [place for place, label in enumerate(example.labels) if place and label != IGNORE]
    return [place for place in places if example.labels[place] not in ends] or places


def _states(model: nn.Module, tokenizer: Any, rows: Sequence[Fact]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each row's place with every layer's states where its tokens are predicted: one position before them.

    The first entry is the embedding's output, the last has been through the final norm.
    """
    device = next(model.parameters()).device
    for batch in length_batches([len(row.example.input_ids) for row in rows], BATCH_TOKENS_CPU):
        padded = pad_batch([rows[place].example for place in batch], tokenizer.pad_token_id)
        output = model(
            input_ids=padded["input_ids"].to(device),
            attention_mask=padded["attention_mask"].to(device),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        for row, place in enumerate(batch):
            before = [token - 1 for token in rows[place].places]
            yield place, [layer[row, before] for layer in output.hidden_states]


def features(model: nn.Module, tokenizer: Any, rows: Sequence[Fact]) -> tuple[list[int], Array, Array, Array]:
    """Return what the probe reads: probed layers, states (tokens, layers, width), tokens, and each one's row."""
    found: dict[int, NDArray[np.float32]] = {}
    layers: list[int] = []
    with torch.no_grad(), evaluating(model):
        for place, states in _states(model, tokenizer, rows):
            layers = layers or spread(len(states) - 1)
            found[place] = torch.stack([states[layer].float() for layer in layers], dim=1).cpu().numpy()
    owners = np.concatenate([[place] * len(row.places) for place, row in enumerate(rows)])
    tokens = np.concatenate([row.tokens for row in rows])
    return layers, np.concatenate([found[place] for place in range(len(rows))]), tokens, owners


def spread(count: int) -> list[int]:
    """Return the layers (from 1) to probe: all up to eight, else eight evenly spread ones with the last."""
    return sorted({round(layer) for layer in np.linspace(1, count, min(count, LAYERS))})


def probe(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Fact],
    known: Sequence[Fact],
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Read the forget rows' tokens off hidden states by a linear probe, layer by layer.

    A logistic regression (standardised states, C = 1) learns which token follows from the state before it, on `known`
    rows and on the forget rows outside a fold, and is judged on the fold's: all tokens of a row are in one fold. A
    row's number `layer_<l>` is the share of its tokens that the probe names. Tokens that it never saw in training
    cannot be named; they count as missed, for every model alike. Raises InputError without two rows on either side.
    """
    if len(forget) < 2 or len(known) < 2:
        raise InputError("A probe needs two forget rows and two retain rows.", "Leave this attack out.")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    layers, ours, tokens, owners = features(model, tokenizer, forget)
    _, theirs, others, _ = features(model, tokenizer, known)
    picked = np.random.default_rng(seed).permutation(len(others))[:TOKENS]
    theirs, others = theirs[picked], others[picked]
    rows: list[dict[str, float]] = [{"index": row.index} for row in forget]
    splits = list(GroupKFold(min(folds, len(forget)), shuffle=True, random_state=seed).split(ours, groups=owners))
    for place, layer in enumerate(layers):
        named = np.zeros(len(tokens), dtype=bool)
        for train, test in splits:
            X, y = np.concatenate([theirs, ours[train]])[:, place], np.concatenate([others, tokens[train]])
            if len(set(y)) < 2:
                named[test] = tokens[test] == y[0]
                continue
            fitted = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=200, tol=1e-3)).fit(X, y)
            named[test] = fitted.predict(ours[test][:, place]) == tokens[test]
        for row, numbers in enumerate(rows):
            numbers[f"layer_{layer}"] = float(named[owners == row].mean())
    return rows
