"""Export: the files that PEFT reads, half precision, zero changes, truncation beyond a layer, what is no LoRA.

That the export computes what the anchored model computes is tested with the anchor.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from builders import tiny_model
from loku.adapters.export import PortableLora, load_lora, merged_weights, save_merged, truncate
from loku.errors import InputError

NAMES = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("up", "down")]


def made(rank=4, *, names=NAMES, scaling=2.0, seed=0):
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    return PortableLora(
        A={name: torch.randn(rank, shape[1], generator=generator) for name, shape in shapes.items()},
        B={name: torch.randn(shape[0], rank, generator=generator) for name, shape in shapes.items()},
        rank=rank,
        scaling=scaling,
        target_modules=["up_proj", "down_proj"],
        fan_in_fan_out=False,
    )


def test_the_files_are_pefts(tmp_path):
    lora = made()
    assert lora.save(tmp_path / "a" / "adapter", base_model="owner/name") == tmp_path / "a" / "adapter"
    assert {p.name for p in (tmp_path / "a" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "base_model_name_or_path": "owner/name", "target_modules": ["down_proj", "up_proj"],
        "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    assert expected.items() <= config.items()
    tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}.lora_{letter}.weight" for name in NAMES for letter in "AB"}
    again = load_lora(tmp_path / "a" / "adapter")
    assert (again.rank, again.scaling, sorted(again.target_modules)) == (4, 2.0, ["down_proj", "up_proj"])
    assert all(torch.equal(again.delta(name), lora.delta(name)) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision(tmp_path, dtype):
    lora = made()
    lora.save(tmp_path, base_model=None, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    again = load_lora(tmp_path)
    for name in NAMES:
        assert again.A[name].dtype == torch.float32
        assert (again.delta(name) - lora.delta(name)).norm() < 0.01 * lora.delta(name).norm()


def test_the_same_export_is_the_same_file(tmp_path):
    for name in ("one", "two"):
        made().save(tmp_path / name, base_model=None)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_truncation_is_an_adapter_that_loads(tmp_path):
    lora = made(rank=6)
    smaller = truncate(lora, 2)
    smaller.lora.save(tmp_path, base_model=None)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.peft_config["default"].r == 2
    assert smaller.lora.scaling == lora.scaling
    assert 0 < smaller.error <= smaller.worst < 1


def test_truncation_to_any_rank_gives_less_error_with_more_rank():
    lora = made(rank=6)
    errors = [truncate(lora, rank).error for rank in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    assert errors[0] > 0.5


def test_an_adapter_wider_than_a_layer_is_padded():
    """A folded anchor doubles the rank, which may exceed the smaller side of a layer."""
    name = "model.layers.0.self_attn.k_proj"
    lora = made(rank=40, names=[name])  # the layer is 16 x 32
    smaller = truncate(lora, 30)
    assert smaller.lora.A[name].shape == (30, 32)
    assert smaller.lora.B[name].shape == (16, 30)
    assert smaller.error < 1e-6
    torch.testing.assert_close(smaller.lora.delta(name), lora.delta(name), rtol=1e-4, atol=1e-3)


def test_no_change_is_truncated_and_merged_to_no_change():
    lora = made()
    for name in NAMES:
        lora.B[name].zero_()
    smaller = truncate(lora, 1)
    assert (smaller.error, smaller.worst) == (0.0, 0.0)
    base = tiny_model()
    merged = merged_weights(base, smaller.lora)
    assert all(torch.equal(merged[name], value) for name, value in base.state_dict().items())


def test_merging_is_computed_in_float32_and_stored_in_the_bases_type(tmp_path):
    lora = made(scaling=0.01)
    base = tiny_model().bfloat16()
    merged = merged_weights(base, lora)
    for name, value in base.state_dict().items():
        assert merged[name].dtype == torch.bfloat16
        layer = name.removesuffix(".weight")
        if layer in NAMES:
            assert torch.equal(merged[name], (value.float() + lora.delta(layer)).bfloat16())
            assert not torch.equal(merged[name], value)
        else:
            assert torch.equal(merged[name], value)
    save_merged(base, lora, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[f"{name}.weight"], merged[f"{name}.weight"]) for name in NAMES)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_folder_is_refused(tmp_path, missing):
    made().save(tmp_path, base_model=None)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=r"is not an adapter folder: it lacks adapter_config\.json or adapter_model"):
        load_lora(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_rslora": True}, "use_rslora"),  # scaled by alpha / sqrt(r): would be merged at the wrong size
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"up_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_more_than_a_lora_are_refused(tmp_path, settings, named):
    config = LoraConfig(**({"r": 4, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"} | settings))
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=rf"is not an ordinary LoRA \({named}.*\)\.\nGive an adapter that `loku` wrote"
    ):
        load_lora(tmp_path)


def test_trained_biases_are_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["fc1"], task_type="CAUSAL_LM", bias="lora_only")
    get_peft_model(tiny_model("phi"), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is not an ordinary LoRA \(base_model\.model\..*bias\)"):
        load_lora(tmp_path)


def test_other_kinds_and_foreign_tensors_are_refused(tmp_path):
    made().save(tmp_path, base_model=None)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole = json.loads(config.read_text())
    for changed in ({"peft_type": "IA3"}, {"target_modules": ".*up_proj"}):
        config.write_text(json.dumps(whole | changed))
        with pytest.raises(InputError, match=r"is not an ordinary LoRA \(by its adapter_config\.json\)"):
            load_lora(tmp_path)
    config.write_text(json.dumps(whole))
    save_file(load_file(weights) | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(InputError, match=r"is not an ordinary LoRA \(base_model\.model\.lm_head\.weight\)"):
        load_lora(tmp_path)


def test_an_adapter_that_peft_made_is_read(tmp_path):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(), config)
    adapted.save_pretrained(tmp_path)
    lora = load_lora(tmp_path)
    merged = merged_weights(tiny_model(), lora)
    expected = adapted.merge_and_unload().state_dict()
    assert lora.scaling == 3.0
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value)
