"""From a batch to what losses look at: scores, logits or hidden states of the supervised tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loku.losses.lm_head import HeadSpec, last_hidden_state, lm_head_of
from loku.losses.positions import IGNORE, Supervised, supervised
from loku.losses.scores import Extra, TokenScores, scores_from_logits

Batch = Mapping[str, Tensor]


class Forward:
    """Runs a causal language model on batches.

    Scores come straight from the hidden states where the model's logits are its head's output (`lm_head_of`);
    otherwise, and with `plain`, from the logits. `plain_because` says why, or is None. `layer` is the decoder layer
    whose output `hidden` returns (negative counts from the end).
    """

    def __init__(self, model: nn.Module, *, layer: int | None = None, plain: bool = False) -> None:
        self.layer = layer
        found = "the plain path was asked for" if plain else lm_head_of(model)
        self.head = found if isinstance(found, HeadSpec) else None
        self.plain_because = found if isinstance(found, str) else None

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of all positions."""
        logits: Tensor = model(**inputs(batch), use_cache=False).logits
        return logits

    def scores(
        self, model: nn.Module, batch: Batch, need: Collection[Extra] = (), *, every_position: bool = False
    ) -> TokenScores:
        """Return the scores of the supervised tokens, or of all that are not padding."""
        labels = every_token(batch) if every_position else batch["labels"]
        if self.head is not None:
            scores = self.head.scores(last_hidden_state(model, batch, self.head), labels, need=need)
        else:
            scores = scores_from_logits(self.logits(model, batch), labels, need=need)
        weights = None if every_position else token_weights(batch)
        return scores if weights is None else dataclasses.replace(scores, weights=weights)

    def positions(self, model: nn.Module, batch: Batch) -> Supervised:
        """Return the float32 logits at the supervised positions."""
        return supervised(self.logits(model, batch), batch["labels"])

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the chosen layer's output at the supervised tokens themselves (not at those that predict them)."""
        assert self.layer is not None
        output: Any = model(**inputs(batch), use_cache=False, output_hidden_states=True, logits_to_keep=1)
        states = output.hidden_states[self.layer + 1 if self.layer >= 0 else self.layer]
        mask = batch["labels"] != IGNORE
        mask[:, 0] = False  # as everywhere: nothing predicts the first token
        selected: Tensor = states[mask]
        return selected.to(torch.float32) if selected.dtype != torch.float64 else selected


def inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what of a batch goes into the model."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part."""
    config: Any = model.config
    return config.get_text_config()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a model: the one as long as the configuration says."""
    wanted = text_config(model).num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted)


def every_token(batch: Batch) -> Tensor:
    """Return labels that supervise every token but padding."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)


def token_weights(batch: Batch) -> Tensor | None:
    """Return the weights of the supervised tokens, in the order of the scores, or None."""
    if "weights" not in batch:
        return None
    return batch["weights"][:, 1:][batch["labels"][:, 1:] != IGNORE]


def count_items(batch: Batch) -> Tensor:
    """Return the weight of all supervised tokens of a batch: their number, unless they carry weights."""
    weights = token_weights(batch)
    if weights is None:
        return (batch["labels"][:, 1:] != IGNORE).sum()
    return weights.sum()
