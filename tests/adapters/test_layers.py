"""Which layers are adapted, and the errors when none can be."""

from __future__ import annotations

import pytest
import torch

from builders import ARCHITECTURES, tiny_model
from loku.adapters.layers import check_rank, shortest_targets, target_layers, weight
from loku.errors import InputError

PROJECTIONS = {
    "llama": 7, "qwen3": 7, "mistral": 7, "gemma3_text": 7, "olmo": 7, "olmo2": 7,
    "phi": 6, "phi3": 4, "gpt_neo": 6, "gpt_neox": 4, "gpt2": 4,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_layers_but_the_head(architecture):
    model = tiny_model(architecture)
    layers = target_layers(model)
    assert len(layers) == 2 * PROJECTIONS[architecture]
    assert all(layer is not model.get_output_embeddings() for layer in layers.values())
    short = shortest_targets(model, layers)
    assert len(short) <= PROJECTIONS[architecture]


def test_transposed_weights_are_turned():
    layer = tiny_model("gpt2").transformer.h[0].mlp.c_fc
    assert weight(layer).shape == (128, 32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(x @ weight(layer).T + layer.bias, layer(x))


def test_targets_by_name():
    layers = target_layers(tiny_model(), "q_proj, mlp.up_proj")
    assert [name.rsplit(".", 1)[-1] for name in layers] == ["q_proj", "up_proj"] * 2


def test_names_that_also_name_other_layers_are_written_out():
    model = tiny_model()
    layers = dict(list(target_layers(model, "q_proj").items())[:1])
    assert shortest_targets(model, layers) == ["model.layers.0.self_attn.q_proj"]


def test_unknown_target_names_the_nearest():
    with pytest.raises(InputError, match=r"--targets 'qproj' matches no linear layer.*\nDid you mean 'q_proj'\?"):
        target_layers(tiny_model(), "qproj")


def test_the_head_is_refused():
    with pytest.raises(InputError, match=r"--targets 'lm_head' names the output head\.\nLeave it out"):
        target_layers(tiny_model(), "lm_head")


def test_quantised_weights_are_refused():
    model = tiny_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"q_proj' of this model is quantised \(Linear\)\.\nLoad the model in"):
        target_layers(model)


def test_a_model_without_linear_layers_is_refused():
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match=r"has no linear layers besides its output head\.\nUse --tune full"):
        target_layers(model)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(17, r"--rank 17 is above the size of the layer '.*k_proj' \(16\)\.\nChoose a rank of at most 16"),
     (0, r"--rank 0 is not positive\.\nGive a rank of at least 1")],
)  # fmt: skip
def test_impossible_ranks_are_refused(rank, message):
    with pytest.raises(InputError, match=message):
        check_rank(target_layers(tiny_model()), rank)
