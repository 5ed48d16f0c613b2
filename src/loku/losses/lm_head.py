"""Whether a model's logits are softcap(W h + b), and its last hidden states without the logits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loku.errors import InputError
from loku.losses.head import scores_from_hidden, scores_of_states
from loku.losses.positions import Selection, widest
from loku.losses.scores import Extra, TokenScores

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of sequences side by side, for flash
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", *BORDERS)
SPREAD = 50.0  # standard deviation of the logits that the check provokes: no soft cap or scale hides at that size


@dataclass(frozen=True)
class HeadSpec:
    """A model's LM head: logits = z, or softcap * tanh(z / softcap), with z = module(hidden states).

    It holds the module, not its weights: these may be replaced or moved after the check.
    """

    module: nn.Linear
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """The number of tokens that it scores."""
        return self.module.weight.shape[0]

    def scores(
        self,
        hidden: Float[Tensor, "batch seq d"],
        labels: Int[Tensor, "batch seq"],
        *,
        need: Collection[Extra] = (),
    ) -> TokenScores:
        """Score the supervised positions from the states that enter the head (`scores_from_hidden`)."""
        return scores_from_hidden(hidden, labels, self.module.weight, self.module.bias, softcap=self.softcap, need=need)

    def scores_of(
        self, states: Float[Tensor, "tokens d"], chosen: Selection, need: Collection[Extra] = ()
    ) -> TokenScores:
        """Score positions from their states (`scores_of_states`)."""
        return scores_of_states(states, chosen, self.module.weight, self.module.bias, softcap=self.softcap, need=need)

    def logits(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n vocab"]:
        """Return the logits of states, in float32 at least."""
        weight, bias = self.module.weight, self.module.bias
        exact = widest(states, weight)
        with torch.autocast(states.device.type, enabled=False):
            z = F.linear(states.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def lm_head_of(model: nn.Module) -> HeadSpec | str:
    """Return the head of a causal language model, or the reason why its logits need the plain path.

    No list of architectures is trusted. The model runs twice on four tokens: once with the states that enter the head
    replaced by large random ones, to see that the logits are what HeadSpec says (a logit scale, an unknown soft cap
    or a head that is not used show at once); once to see that the states can be had without the logits. Call it once
    per model. Train and eval mode are restored, and no random numbers of the caller are used.
    """
    causal = unwrapped(model)
    get_output_embeddings = getattr(causal, "get_output_embeddings", None)
    module = get_output_embeddings() if callable(get_output_embeddings) else None
    reason = _unsuitable(module)
    if reason:
        return reason
    assert isinstance(module, nn.Linear)
    spec = HeadSpec(module, _declared_softcap(causal))
    try:
        with torch.no_grad(), _eval_mode(model):
            return _disagreement(model, spec) or spec
    except Exception as error:  # whatever a model's own code raises, the plain path remains
        message = " ".join(str(error).split())[:200]
        return f"the check of its head failed ({type(error).__name__}: {message})"


def last_hidden_state(model: nn.Module, batch: Mapping[str, Any], head: HeadSpec) -> Float[Tensor, "batch seq d"]:
    """Run the model and return the states that enter its head; no logits are computed.

    The model itself is called, through whatever wraps it (PEFT, DistributedDataParallel), and its head is given an
    empty slice: the states are exactly what the head would have seen, and adapters, gradient checkpointing and the
    wrappers' own hooks work as always.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    _run(model, batch, head, catch)
    if len(caught) != 1 or caught[0].shape[:2] != batch["input_ids"].shape:
        raise InputError(
            f"{type(unwrapped(model)).__name__} called its LM head {len(caught)} times, on states of shape "
            f"{[list(c.shape) for c in caught]} for input of shape {list(batch['input_ids'].shape)}.",
            "Use the plain path, scores_from_logits; `lm_head_of` tells which models need it.",
        )
    return caught[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the causal language model inside DistributedDataParallel and PEFT wrappers."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _unsuitable(module: nn.Module | None) -> str | None:
    if module is None:
        return "it has no output embeddings"
    if type(module) is not nn.Linear:  # a subclass may be quantised, a wrapper adds to the output
        return f"its head is a {type(module).__module__}.{type(module).__name__}, not a plain linear layer"
    if module.weight.shape != (module.out_features, module.in_features) or type(module.weight) is not nn.Parameter:
        return "the weights of its head are sharded"
    if module.weight.is_meta or hasattr(module, "_hf_hook"):
        return "the weights of its head are moved in and out of memory"
    if not module.weight.is_floating_point():
        return f"the weights of its head are {module.weight.dtype}"
    return None


def _declared_softcap(model: nn.Module) -> float | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "final_logit_softcapping", None)


def _disagreement(model: nn.Module, head: HeadSpec) -> str | None:
    """Return how the logits differ from what `head` says, or None."""
    weight, bias = head.module.weight, head.module.bias
    batch = {
        "input_ids": torch.arange(4, device=weight.device).remainder(weight.shape[0]).unsqueeze(0),
        "attention_mask": torch.ones(1, 4, dtype=torch.long, device=weight.device),
    }
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight.device)
    unit = F.linear(states.to(weight.dtype), weight).float().std().clamp(min=1e-12)
    states = (states * (SPREAD / unit)).to(weight.dtype)

    logits = _run(model, batch, head, lambda _, arguments: (states, *arguments[1:])).logits
    expected = F.linear(states, weight, bias).float()
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    if logits.shape != expected.shape:
        return f"its logits have shape {list(logits.shape)}, its head makes {list(expected.shape)}"
    # Room for bfloat16, or for TF32; a scale or a cap differs by far more at this spread.
    rounding = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    if not torch.allclose(logits.float(), expected, rtol=rounding, atol=rounding * SPREAD):
        capped = "" if head.softcap is None else f", soft-capped at {head.softcap:g}"
        return f"its logits are not the output of its head{capped} (they are scaled or changed afterwards)"
    last_hidden_state(model, batch, head)
    return None


def _run(model: nn.Module, batch: Mapping[str, Any], head: HeadSpec, before_head: Any) -> Any:
    handle = head.module.register_forward_pre_hook(before_head)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    try:
        return model(**inputs, use_cache=False)
    finally:
        handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
