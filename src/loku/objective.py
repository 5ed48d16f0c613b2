"""The objective of unlearning: a forget term and a retain term, each a loss with its options and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loku.data.batching import PARTS, Plan
from loku.data.encoding import Example
from loku.data.packing import is_laid_out
from loku.errors import InputError, suggestion
from loku.forward import Batch, Forward, count_items, every_token, text_config, token_weights
from loku.losses.head import check_targets
from loku.losses.hidden import control_direction
from loku.losses.positions import IGNORE, count_tokens
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
        for name, value in given.items():
            if name not in self.loss.options:
                valid = self.loss.options
                remedy = suggestion(name, valid) if valid else "It has none."
                raise InputError(f"The {kind} loss '{self.name}' has no option '{name}'.", remedy)
            check_value(f"The {kind} loss '{self.name}'", name, value, self.loss.options[name])
        self.custom = callable(loss)
        self.options = given

    def needs(self, name: str) -> bool:
        """Whether the loss takes the named input."""
        return name in self.loss.needs

    def count(self, batch: Batch, alternate: Batch | None) -> float:
        """Return what the loss averages over in a batch: tokens (or their weights), or sequences."""
        if self.loss.unit == "sequence":
            return float(len(batch["rows"] if is_laid_out(batch) else batch["labels"]))
        if self.loss.unit == "alternate":
            assert alternate is not None
            return count_items(alternate)
        if self.loss.unit == "position" and not is_laid_out(batch):
            return float(count_tokens(every_token(batch)))
        return count_items(batch)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Return which of its rows, "own" and "alternate", the loss runs the model on, and what for."""
        own = tuple(need for need in self.loss.needs if need in ("scores", "positions", "hidden", "logits"))
        return {"own": own, "alternate": ("scores",) if self.needs("alternate") else ()}


def check_value(what: str, name: str, value: Any, default: Any) -> None:
    """Raise InputError for an option's value of another kind than its default, and for a beta that is not above 0."""
    kind = bool if isinstance(default, bool) else int | float
    usable = (value is None and default is None) or isinstance(value, kind)
    if not usable or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{what} got {name}={value!r}.", "Give true or false." if kind is bool else "Give a number.")
    if name == "beta" and not value > 0:
        raise InputError(f"{what} got beta={value}, and divides by it.", "Give a number above 0.")


def on_logits(function: OnLogits) -> Callable[..., Tensor]:
    """Turn a mean over the tokens of one micro-batch into this micro-batch's part of the step's mean."""

    def scaled(logits: Tensor, labels: Tensor, *, num_items: Tensor) -> Tensor:
        return function(logits, labels) * count_tokens(labels) / num_items

    return scaled


class Objective:
    """Both terms, and the target model's values that they compare with.

    Where a batch has a `level`, the forget tokens' log-probabilities under a model that IHL should not undercut, IHL
    takes it.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        forget: Term,
        retain: Term,
        seed: int = 0,
    ) -> None:
        self.forward = forward
        self.forget = forget
        self.retain = retain
        copies = any(term.needs(name) for term in (forget, retain) for name in COPIED)
        self.target = TargetValues(model, forward, copies=copies)
        self.parts = dict(zip(PARTS, [*forget.reads().values(), *retain.reads().values()], strict=True))
        self.sums: Tensor | None = None
        self.alternate_sums: Tensor | None = None
        self.direction: Tensor | None = None
        if forget.needs("direction"):
            self.direction = control_direction(text_config(model).hidden_size, seed)

    def check_vocabulary(self, *groups: Any) -> None:
        """Raise InputError for labels that are no token of the model: later nobody looks, to wait for no GPU.

        Each group is a list of examples, of lists of examples, or None.
        """
        if self.forward.head is None:
            return
        flat = [e for group in groups for item in group or () for e in (item if isinstance(item, list) else [item])]
        found = {label for example in flat for label in example.labels if label != IGNORE}
        check_targets(torch.tensor([min(found, default=0), max(found, default=0)]), self.forward.head.vocab_size)

    def plan(self, *, together: bool) -> Plan:
        """Return how the collator lays out each part of a batch.

        `together` allows one forward pass for all parts. That is made where every loss looks at token scores alone:
        values of the target model and hidden states come from passes of their own.
        """
        layout = self.forward.layout
        laid_out = {part for part, read in self.parts.items() if layout is not None and "logits" not in read}
        shared = together and all(set(read) <= {"scores"} for read in self.parts.values()) and len(laid_out) == 4
        return Plan(
            layout=layout,
            laid_out=frozenset(laid_out),
            together=shared,
            read=frozenset(part for part, read in self.parts.items() if read),
            whole=frozenset(part for part, read in self.parts.items() if "hidden" in read),
            every=frozenset({"forget"} if self.forget.loss.unit == "position" else ()),
        )

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
        if term.name == "ihl" and "level" in batch:
            more["level"] = batch["level"]
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

    def scores(self) -> Any:
        return self.objective.forward.scores(
            self.model, self.batch, self.term.loss.fields, every_position=self.term.loss.unit == "position"
        )

    def alternate(self) -> Any:
        assert self.others is not None
        return self.objective.forward.scores(self.model, self.others)

    def reference(self) -> Tensor:
        assert self.objective.sums is not None
        position = self.batch["position"]
        self.objective.sums = self.objective.sums.to(position.device)  # copied once, at the first step
        return self.objective.sums[position]

    def alternate_reference(self) -> Tensor:
        assert self.objective.alternate_sums is not None
        assert self.others is not None
        position = self.batch["position"]
        self.objective.alternate_sums = self.objective.alternate_sums.to(position.device)
        return self.objective.alternate_sums[position, self.others["draw"]]

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
        self.objective.direction = self.objective.direction.to(self.batch["position"].device)
        return self.objective.direction

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
