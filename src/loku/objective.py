"""The objective of unlearning: a forget term and a retain term, each a loss with its options and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loku.data.encoding import Example
from loku.errors import InputError, suggestion
from loku.forward import Batch, Forward, count_items, every_token, text_config, token_weights
from loku.losses.hidden import control_direction
from loku.losses.positions import count_tokens
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES, Loss
from loku.target_values import TargetValues, weighted_sum

OnLogits = Callable[[Tensor, Tensor], Tensor]

COPIED = ("reference_logits", "reference_hidden")  # needs of the target model that cannot be cached


class Term:
    """One side of the objective: a named loss with its options, or a function of (logits, labels).

    Raises InputError for names and options that do not exist.
    """

    def __init__(
        self, loss: str | OnLogits, losses: Mapping[str, Loss], options: Mapping[str, Any] | None, kind: str
    ) -> None:
        given = dict(options or {})
        if callable(loss):
            if given:
                raise InputError(f"The {kind} loss is a function, but has options ({', '.join(given)}).", "Bind them.")
            self.name, self.loss = getattr(loss, "__name__", kind), Loss(on_logits(loss), ("logits", "labels"))
        elif loss in losses:
            self.name, self.loss = loss, losses[loss]
        else:
            raise InputError(f"'{loss}' is not a {kind} loss.", suggestion(loss, losses))
        for name in given:
            if name not in self.loss.options:
                valid = self.loss.options
                remedy = suggestion(name, valid) if valid else "It has none."
                raise InputError(f"The {kind} loss '{self.name}' has no option '{name}'.", remedy)
        self.options = given

    def needs(self, name: str) -> bool:
        """Whether the loss takes the named input."""
        return name in self.loss.needs

    def count(self, batch: Batch, alternate: Batch | None) -> Tensor:
        """Return what the loss averages over in a batch: tokens (or their weights), or sequences."""
        if self.loss.unit == "sequence":
            return torch.tensor(float(len(batch["labels"])))
        if self.loss.unit == "alternate":
            assert alternate is not None
            return count_items(alternate)
        if self.loss.unit == "position":
            return count_tokens(every_token(batch))
        return count_items(batch)


def on_logits(function: OnLogits) -> Callable[..., Tensor]:
    """Turn a mean over the tokens of one micro-batch into this micro-batch's part of the step's mean."""

    def scaled(logits: Tensor, labels: Tensor, *, num_items: Tensor) -> Tensor:
        return function(logits, labels) * count_tokens(labels) / num_items

    return scaled


class Objective:
    """Both terms, and the target model's values that they compare with.

    `layer` is the decoder layer that losses on hidden states look at. `level` holds, for every forget example, its
    tokens' log-probabilities under a model that IHL should not undercut.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        forget: Term,
        retain: Term,
        seed: int = 0,
        level: Sequence[Tensor] | None = None,
    ) -> None:
        self.forward = forward
        self.forget = forget
        self.retain = retain
        self.level = level
        copies = any(term.needs(name) for term in (forget, retain) for name in COPIED)
        self.target = TargetValues(model, forward, copies=copies)
        self.sums: Tensor | None = None
        self.alternate_sums: Tensor | None = None
        self.direction: Tensor | None = None
        if forget.needs("direction"):
            self.direction = control_direction(text_config(model).hidden_size, seed)

    def prepare(
        self,
        forget: Sequence[Example],
        alternates: Sequence[Sequence[Example]] | None,
        *,
        pad_id: int,
        batch_size: int = 8,
        cached: Sequence[Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute the target model's log-probabilities that the forget loss compares with, before the first step."""

        def sums(examples: Sequence[Example], known: Sequence[Tensor] | None = None) -> Tensor:
            values = known or self.target.token_logprobs(
                examples, pad_id=pad_id, batch_size=batch_size, progress=progress
            )
            return torch.stack([weighted_sum(example, v) for example, v in zip(examples, values, strict=True)])

        if self.forget.needs("reference"):
            self.sums = sums(forget, cached)
        if self.forget.needs("alternate_reference"):
            assert alternates is not None
            flat = sums([example for draws in alternates for example in draws])
            parts = flat.split([len(draws) for draws in alternates])
            self.alternate_sums = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def forget_term(self, model: nn.Module, batch: Batch, alternate: Batch | None, items: Tensor) -> Tensor:
        """Return the forget loss of a micro-batch, scaled to the whole step."""
        return self._value(self.forget, model, batch, alternate, items)

    def retain_term(self, model: nn.Module, batch: Batch, alternate: Batch | None, items: Tensor) -> Tensor:
        """Return the retain loss of a micro-batch, scaled to the whole step."""
        return self._value(self.retain, model, batch, alternate, items)

    def _value(self, term: Term, model: nn.Module, batch: Batch, alternate: Batch | None, items: Tensor) -> Tensor:
        found = _Inputs(self, term, model, batch, alternate)
        more: dict[str, Any] = {"weights": token_weights(batch)} if term.loss.takes_weights else {}
        if term.name == "ihl" and self.level is not None:
            more["level"] = found.level()
        arguments = [getattr(found, name)() for name in term.loss.needs]
        return term.loss.function(*arguments, num_items=items, **term.options, **more)


class _Inputs:
    """What a loss may need of a batch; each method is named after the need that it meets."""

    def __init__(
        self, objective: Objective, term: Term, model: nn.Module, batch: Batch, alternate: Batch | None
    ) -> None:
        self.objective = objective
        self.term = term
        self.model = model
        self.batch = batch
        self.others = alternate
        self.device = batch["input_ids"].device
        self._positions: Any = None

    def scores(self) -> Any:
        return self.objective.forward.scores(
            self.model, self.batch, self.term.loss.fields, every_position=self.term.loss.unit == "position"
        )

    def alternate(self) -> Any:
        assert self.others is not None
        return self.objective.forward.scores(self.model, self.others)

    def reference(self) -> Tensor:
        assert self.objective.sums is not None
        return self.objective.sums.to(self.device)[self.batch["position"]]

    def alternate_reference(self) -> Tensor:
        assert self.objective.alternate_sums is not None
        assert self.others is not None
        return self.objective.alternate_sums.to(self.device)[self.batch["position"], self.others["draw"]]

    def positions(self) -> Any:
        return self.objective.forward.positions(self.model, self.batch)

    def reference_logits(self) -> Tensor:
        return self.objective.target.logits(self.batch)

    def hidden(self) -> Tensor:
        return self.objective.forward.hidden(self.model, self.batch)

    def reference_hidden(self) -> Tensor:
        return self.objective.target.hidden(self.batch)

    def direction(self) -> Tensor:
        assert self.objective.direction is not None
        return self.objective.direction.to(self.device)

    def level(self) -> Tensor:
        assert self.objective.level is not None
        return torch.cat([self.objective.level[place] for place in self.batch["position"].tolist()]).to(self.device)

    def logits(self) -> Tensor:
        return self.objective.forward.logits(self.model, self.batch)

    def labels(self) -> Tensor:
        return self.batch["labels"]


def forget_term(loss: str | OnLogits = "ihl", options: Mapping[str, Any] | None = None) -> Term:
    """Return the forget side of an objective."""
    return Term(loss, FORGET_LOSSES, options, "forget")


def retain_term(loss: str | OnLogits = "nll", options: Mapping[str, Any] | None = None) -> Term:
    """Return the retain side of an objective."""
    return Term(loss, RETAIN_LOSSES, options, "retain")
