"""ReGLU's view of a layer: which directions of its output the forget and the retain rows use. Forward passes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from loku.adapters.backward import frozen, plan_batches
from loku.adapters.layers import Layers
from loku.data.batching import pad_batch
from loku.data.encoding import Example

ROWS = 256
RETAIN_DIRECTIONS = 128


class LayerActivations(NamedTuple):
    """One layer's outputs, summed over the positions of each row that are not padding."""

    forget: Float[Tensor, "forget_rows out"]
    retain: Float[Tensor, "retain_rows out"]


def pooled_outputs(
    model: PreTrainedModel,
    layers: Layers,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int = 8,
    padding: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Float[Tensor, "rows out"]]:
    """Return each layer's output on each row, summed over positions, in float32.

    Masked positions do not count: what a layer puts out on padding is no property of the row. With `padding` they do,
    as released, and the result depends on how rows are batched (here: in order). Nothing goes through the LM head,
    and these vectors are all that is stored: they hold the same second moments as an out x out matrix, in less space.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    mask = torch.empty(0)

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            output = output.detach().reshape(*mask.shape, -1).float()
            sums[name].append(torch.einsum("bt,bto->bo", mask, output).cpu())

        return keep

    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    if padding:
        order = list(range(len(examples)))
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    head = model.get_output_embeddings()
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1], *inputs[1:])))
    try:
        with frozen(model), torch.no_grad():
            done = 0
            for chunk in plan_batches([examples[place] for place in order], batch_size, sort=False):
                batch = {key: value.to(model.device) for key, value in pad_batch(chunk, pad_id).items()}
                mask = torch.ones_like(batch["attention_mask"]) if padding else batch["attention_mask"]
                mask = mask.float()
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                done += len(chunk)
                if progress is not None:
                    progress(done, len(examples))
    finally:
        for handle in handles:
            handle.remove()
    back = torch.tensor(order).argsort()
    return {name: torch.cat(found)[back] for name, found in sums.items()}


def forget_subspace(activations: LayerActivations, rank: int, *, beta: float) -> Float[Tensor, "out found"]:
    """Return the orthonormal directions that the forget rows use most and the retain rows least, at most `rank`.

    With uncentred second moments C = sum_i p_i p_i^T / n of the pooled outputs p, they are the eigenvectors of the
    largest eigenvalues of

        (1 - beta) C_f - beta C_r

    that are positive: beyond those no direction holds more of the forget set than of the retain set. The matrix has at
    most as many eigenvalues other than 0 as there are rows, so a QR of the rows leaves a small problem. In float64.
    """
    forget, retain = (part.double() for part in activations)
    parts = [forget * ((1 - beta) / len(forget)) ** 0.5, retain * (beta / len(retain)) ** 0.5]
    signs = torch.cat([torch.ones(len(forget)), -torch.ones(len(retain))]).to(forget)
    Q, R = torch.linalg.qr(torch.cat(parts).T)
    values, vectors = torch.linalg.eigh((R * signs) @ R.T)
    kept = values > values.abs().max() * 1e-10
    return (Q @ vectors[:, kept].flip(1)[:, :rank]).float()


def retain_subspace(
    retain: Float[Tensor, "rows out"], directions: int = RETAIN_DIRECTIONS
) -> Float[Tensor, "out found"]:
    """Return P, the eigenvectors of the largest eigenvalues of C_r other than 0: at most `directions`."""
    _, S, Vh = torch.linalg.svd(retain.double(), full_matrices=False)
    kept = min(directions, int((S.max() * 1e-7 < S).sum()))
    return Vh[:kept].T.contiguous().float()


def share(pooled: Float[Tensor, "rows out"], Q: Float[Tensor, "out found"]) -> float:
    """Return the share of the rows' energy that lies in the span of Q, sum |Q^T p|^2 / sum |p|^2."""
    total = float(pooled.square().sum())
    return float((pooled @ Q).square().sum()) / total if total else 0.0
