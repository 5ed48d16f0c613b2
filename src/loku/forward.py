"""From a batch to what losses look at: scores, logits or hidden states of the supervised tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from loku.data.packing import Layout, is_laid_out
from loku.errors import InputError
from loku.layouts import layout_of, model_inputs
from loku.losses.lm_head import HeadSpec, last_hidden_state, lm_head_of
from loku.losses.positions import IGNORE, Selection, Supervised, supervised
from loku.losses.scores import Extra, TokenScores, scores_from_logits

Batch = Mapping[str, Any]  # padded (`pad_batch`), or laid out in blocks (`part_of_batch`)


class Forward:
    """Runs a causal language model on batches.

    Scores come straight from the hidden states where the model's logits are its head's output (`lm_head_of`);
    otherwise, and with `plain`, from the logits. `plain_because` says why, or is None. `layout` says how sequences are
    laid out for it (`layout_of`; None: only padded batches of all logits), `padded_because` why not without padding.
    `layer` is the decoder layer whose output `hidden` returns (negative counts from the end).
    """

    def __init__(self, model: nn.Module, *, layer: int | None = None, plain: bool = False, packed: bool = True) -> None:
        self.layer = layer
        found = "the plain path was asked for" if plain else lm_head_of(model)
        self.head = found if isinstance(found, HeadSpec) else None
        self.plain_because = found if isinstance(found, str) else None
        self.layout: Layout | None = None
        self.padded_because: str | None = self.plain_because
        if self.head is not None:
            self.layout, self.padded_because = layout_of(model, self.head)
            if not packed:
                self.layout = dataclasses.replace(self.layout, kind="padded")
                self.padded_because = "the padded path was asked for"

    def of_copy(self, model: Any) -> Forward:
        """Return the same for a copy of the model, which has a head of its own."""
        other = copy.copy(self)
        if self.head is not None:
            other.head = dataclasses.replace(self.head, module=model.get_output_embeddings())
        return other

    def states(self, model: nn.Module, blocks: Sequence[dict[str, Any]]) -> Float[Tensor, "places d"]:
        """Return the states that enter the head at every place of the blocks."""
        assert self.head is not None
        dtype = self.head.module.weight.dtype
        found = [last_hidden_state(model, model_inputs(b, dtype), self.head).flatten(0, 1) for b in blocks]
        return found[0] if len(found) == 1 else torch.cat(found)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of all positions of a padded batch."""
        logits: Tensor = model(**inputs(batch), use_cache=False).logits
        return logits

    def scores(
        self, model: nn.Module, batch: Batch, need: Collection[Extra] = (), *, every_position: bool = False
    ) -> TokenScores:
        """Return the scores of the supervised tokens, or of all that are not padding.

        Of a laid-out batch, of the tokens that it was laid out for.
        """
        if is_laid_out(batch):
            assert self.head is not None
            scores = self.head.scores_of(self._picked(model, batch), _selection(batch), need)
            return dataclasses.replace(scores, weights=batch.get("weights"))
        labels = every_token(batch) if every_position else batch["labels"]
        if self.head is not None:
            scores = self.head.scores(last_hidden_state(model, batch, self.head), labels, need=need)
        else:
            scores = scores_from_logits(self.logits(model, batch), labels, need=need)
        weights = None if every_position else token_weights(batch)
        return scores if weights is None else dataclasses.replace(scores, weights=weights)

    def positions(self, model: nn.Module, batch: Batch) -> Supervised:
        """Return the float32 logits at the supervised positions."""
        if is_laid_out(batch):
            assert self.head is not None
            return Supervised(self.head.logits(self._picked(model, batch)), batch["targets"], batch["sequence"])
        return supervised(self.logits(model, batch), batch["labels"])

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the chosen layer's output at the supervised tokens themselves (not at those that predict them)."""
        if is_laid_out(batch):
            assert self.head is not None
            dtype = self.head.module.weight.dtype
            found = [self._layer(model, model_inputs(block, dtype)).flatten(0, 1) for block in batch["blocks"]]
            selected = torch.cat(found).index_select(0, batch["places"] + 1)
        else:
            mask = batch["labels"] != IGNORE
            mask[:, 0] = False  # as everywhere: nothing predicts the first token
            selected = self._layer(model, inputs(batch))[mask]
        return selected.to(torch.float32) if selected.dtype != torch.float64 else selected

    def _layer(self, model: nn.Module, given: dict[str, Any]) -> Float[Tensor, "batch seq d"]:
        assert self.layer is not None
        output: Any = model(**given, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        states: Tensor = output.hidden_states[self.layer + 1 if self.layer >= 0 else self.layer]
        return states

    def _picked(self, model: nn.Module, batch: Batch) -> Float[Tensor, "tokens d"]:
        """Return the states of a laid-out batch that predict; those of a shared pass come with the batch."""
        states = batch["states"] if "states" in batch else self.states(model, batch["blocks"])
        picked: Tensor = states.index_select(0, batch["places"])
        return picked


def _selection(batch: Batch) -> Selection:
    return Selection(batch["places"], batch["targets"], batch["sequence"], (len(batch["rows"]), 0))


def inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what of a padded batch goes into the model."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part."""
    config: Any = model.config
    return config.get_text_config()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a model: the one as long as the configuration says.

    Raises InputError for a model that has no such list.
    """
    wanted = text_config(model).num_hidden_layers
    found = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted), None)
    if found is None:
        raise InputError(
            f"The model has no list of {wanted} decoder layers to choose from.",
            "Leave out what asks for layers: --tune-layers, or the attack on hidden states.",
        )
    return found


def unfreeze(model: PreTrainedModel, layers: int | None) -> PreTrainedModel:
    """Make all weights of a model trainable (`tune="full"`), or those of its last decoder layers alone; return it."""
    model.requires_grad_(layers is None)
    if layers is not None:
        for block in decoder_layers(model)[-layers:]:
            block.requires_grad_(True)
    return model


def every_token(batch: Batch) -> Tensor:
    """Return labels that supervise every token but padding."""
    labels: Tensor = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    return labels


def token_weights(batch: Batch) -> Tensor | None:
    """Return the weights of the supervised tokens, in the order of the scores, or None."""
    if "weights" not in batch:
        return None
    weights: Tensor = batch["weights"]
    return weights if is_laid_out(batch) else weights[:, 1:][batch["labels"][:, 1:] != IGNORE]


def count_items(batch: Batch) -> float:
    """Return the weight of all supervised tokens of a batch: their number, unless they carry weights.

    A laid-out batch was counted on the host; nothing is waited for.
    """
    if is_laid_out(batch):
        return float(batch["items"])
    weights = token_weights(batch)
    return float((batch["labels"][:, 1:] != IGNORE).sum() if weights is None else weights.sum())
