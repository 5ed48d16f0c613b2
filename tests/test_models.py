"""Models and tokenizers: what is loaded, what is refused, and a hash of weights that knows no file format."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.errors import InputError
from loku.models import (
    _check_whole,
    check_fits,
    check_model_source,
    check_tokenizer,
    context_length,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    weights_sha256,
)


def refused(given, remedy, call):
    with pytest.raises(InputError) as caught:
        call()
    assert given in caught.value.given
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.given


@pytest.fixture
def folder(tmp_path, model_folder):
    """A model folder that may be broken."""
    return shutil.copytree(model_folder, tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_model_comes_in_eval_mode_and_in_its_own_type(model_folder, tmp_path):
    model = load_model(str(model_folder), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(str(model_folder), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float32", device="cpu").dtype == torch.float32


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device(None) == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")
    for device in ("cuda:1", "cuda", "meta", "vulkan"):
        given = f"--device '{device}' was given, but torch can use none of that kind here."
        refused(given, "Leave --device out, or give another.", lambda: pick_device(device))  # noqa: B023
    refused("--device 'qpu' is not a device.", "Give cpu, cuda or cuda:<number>.", lambda: pick_device("qpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None) == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for device in ("cuda:9", "cuda:99999"):
        refused("but torch can use only 2 of that kind here.", "Leave --device out", lambda: pick_device(device))  # noqa: B023


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "meta-llama/Llama-2-7b-chat-hf"])
def test_hub_ids_are_let_through(name):
    assert check_model_source(name) == name


def test_what_cannot_be_a_model_is_refused(tmp_path, model_folder):
    def check(name, given, remedy):
        refused(given, remedy, lambda: check_model_source(name, option="--retain-only-model"))
        if name:
            refused(given.replace("--retain-only-model", "--model"), remedy, lambda: load_config(name))

    assert check_model_source(str(model_folder)) == str(model_folder)
    check(None, "--retain-only-model is missing.", "Give a model folder or a hub id such as owner/name.")
    check("", "--retain-only-model is missing.", "Give a model folder")
    for name in ("./none", "/none", "~/none", "a/b/c", str(model_folder / "config.json")):
        check(name, f"--retain-only-model '{name}' does not exist as a folder.", "Check the path, or give a hub id")
    check(str(tmp_path), f"--retain-only-model '{tmp_path}' holds no config.json.", "written by save_pretrained.")
    (tmp_path / "adapter_config.json").write_text("{}")
    check(str(tmp_path), f"'{tmp_path}' is an adapter, not a model.", "Give its base model; an adapter goes to")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model_type": "lama"}'])
def test_a_broken_configuration_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    for load in (load_config, load_model):
        refused(f"The model '{folder}' cannot be loaded: ", "Check the name and the", lambda: load(str(folder)))  # noqa: B023


def test_a_hub_model_that_cannot_be_reached_is_refused(monkeypatch):
    refused(
        "The model 'nobody/nothing' cannot be loaded: ", "give a local folder", lambda: load_config("nobody/nothing")
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"bits": 4}, "unknown"),
    ],
)  # fmt: skip
def test_quantised_models_are_refused(folder, config, kind):
    edit(folder / "config.json", quantization_config=config)
    for load in (load_config, load_model):
        refused(f"is quantised ({kind}).", "Give the floating-point model", lambda: load(str(folder)))  # noqa: B023
    assert load_config(str(folder), quantised=True).quantization_config


def test_weights_that_cannot_be_loaded_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def check(said):
        refused(f"The weights of '{folder}' cannot be loaded: {said}", "Give a whole", lambda: load_model(str(folder)))

    weights.write_bytes(whole[:5000])
    check("Error while deserializing header")
    weights.unlink()
    check("Error no file named model.safetensors")
    weights.write_bytes(whole)
    config = (folder / "config.json").read_text()
    edit(folder / "config.json", hidden_size=64)
    check("")
    (folder / "config.json").write_text(config)
    load_model(str(folder))


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "clip"])
def test_models_that_do_not_write_from_left_to_right_are_refused(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    given = f"The model '{folder}' ({kind}) is not a causal language model."
    for load in (load_config, load_model):
        refused(given, "Give one that writes a text from left to right", lambda: load(str(folder)))  # noqa: B023


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_are_whole_and_refused_when_they_are_not(tmp_path, architecture):
    tiny_model(architecture).save_pretrained(tmp_path)
    load_model(str(tmp_path), device="cpu")  # tied weights are not missing
    tensors = load_file(tmp_path / "model.safetensors")
    name, other = sorted(key for key in tensors if ".layers." in key or ".h." in key)[:2]
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    remedy = "Give a whole causal language model"
    refused(f"The weights of '{tmp_path}' lack '{name}'.", remedy, lambda: load_model(str(tmp_path)))
    kept = {k: v for k, v in tensors.items() if k not in (name, other)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    refused(f"The weights of '{tmp_path}' lack '{name}' and 1 others.", remedy, lambda: load_model(str(tmp_path)))


def test_weights_of_another_size_are_refused():
    loading = {"missing_keys": set(), "mismatched_keys": {("lm_head.weight", (3, 2), (2, 2))}}
    refused(
        "The weights of 'm' have another size for 'lm_head.weight'.", "Give a whole causal language model",
        lambda: _check_whole("m", loading),
    )  # fmt: skip


@pytest.mark.parametrize(("architecture", "setting"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_what_a_model_cannot_read_is_refused(architecture, setting):
    tokenizer, model = byte_level_tokenizer(), tiny_model(architecture, **{setting: 20})
    assert context_length(model) == 20
    check_fits(model, tokenizer, 20)
    given = "The longest row has 21 tokens, but the model reads 20 at most."
    refused(given, "Give --max-length 20 or less", lambda: check_fits(model, tokenizer, 21))
    smaller = tiny_model(architecture, vocab_size=300)
    given = f"The tokenizer has ids up to {len(tokenizer) - 1}, but the model's embedding has 300 rows."
    refused(given, "Give the tokenizer that belongs to the model", lambda: check_fits(smaller, tokenizer, 2))
    check_fits(tiny_model(architecture, vocab_size=500), tokenizer, 2)
    if architecture == "llama":
        check_fits(lora(model), tokenizer, 20)


OWN_CODE = """
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


def test_code_in_a_model_folder_is_not_run_by_default(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (folder / "own.py").write_text(OWN_CODE)
    for load in (load_config, load_model):
        refused("contains custom code which must be executed", "needs --trust-remote-code.", lambda: load(str(folder)))  # noqa: B023
    assert not list(tmp_path.rglob("executed"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_config(str(folder), trust_remote_code=True)
    assert list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("trust", [None, False, True])
def test_trust_is_passed_on_and_off_by_default(model_folder, monkeypatch, trust):
    asked = []

    def spy(cls):
        original = cls.from_pretrained

        def from_pretrained(*arguments, **options):
            asked.append(options["trust_remote_code"])
            return original(*arguments, **options)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        spy(cls)
    given = {} if trust is None else {"trust_remote_code": trust}
    load_config(str(model_folder), **given)
    load_model(str(model_folder), **given)
    load_tokenizer(str(model_folder), **given)
    assert len(asked) >= 4
    assert set(asked) == {bool(trust)}


def lora(model=None, **settings):
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    return get_peft_model(model or tiny_model(), config)


def test_an_adapter_is_put_on_the_model(tmp_path, model_folder):
    adapted = lora()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    adapted.save_pretrained(tmp_path)
    loaded = load_model(str(model_folder), adapter=str(tmp_path), device="cpu")
    assert not loaded.training
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits)
        assert not torch.allclose(loaded(ids).logits, tiny_model()(ids).logits)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    def check(given, remedy, model=None):
        refused(f"--adapter '{tmp_path}' {given}", remedy, lambda: load_adapter(model or tiny_model(), str(tmp_path)))

    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    check("holds no adapter_config.json.", "Give the `adapter` folder of a run.")
    lora().save_pretrained(tmp_path)
    whole = weights.read_bytes()
    check("does not fit this model: ", "Give the base model that the adapter was trained on", tiny_model("gpt2"))
    check("does not fit this model: ", "Give the base model", tiny_model(hidden_size=64))
    weights.write_bytes(whole[:100])
    check("does not fit this model: ", "Give the base model")
    tensors = load_file_of(whole, tmp_path)
    save_file(dict(list(tensors.items())[1:]), weights)
    check("does not fit this model: Found missing adapter keys", "Give the base model")
    weights.unlink()
    check("does not fit this model: ", "Give the base model")
    weights.write_bytes(whole)
    config.write_text("{}")
    check("does not fit this model: ", "Give the base model")
    config.write_text("{")
    check("does not fit this model: ", "Give the base model")


def load_file_of(data, folder):
    (folder / "whole.safetensors").write_bytes(data)
    return load_file(folder / "whole.safetensors")


def test_a_tokenizer_without_padding_pads_with_its_end(folder):
    edit(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert check_tokenizer(byte_level_tokenizer()).pad_token == "<|pad|>"


def test_tokenizers_that_cannot_be_used_are_refused(folder):
    def check(given, remedy):
        refused(f"The tokenizer of '{folder}' {given}", remedy, lambda: load_tokenizer(str(folder)))

    edit(folder / "tokenizer_config.json", eos_token=None)
    check("has no end-of-sequence token.", "Set one (tokenizer.eos_token = ...): without it no answer ever ends.")
    (folder / "tokenizer.json").write_text("{")
    check("cannot be loaded: ", "Save the tokenizer into the model folder (tokenizer.save_pretrained).")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    check("cannot be loaded: ", "Save the tokenizer into the model folder")
    nameless = byte_level_tokenizer.__wrapped__()
    nameless.eos_token = None
    refused("The tokenizer of 'this model' has no end", "Set one", lambda: check_tokenizer(nameless))


def test_the_hash_of_weights_does_not_depend_on_the_file_format(tmp_path, model_folder):
    expected = weights_sha256(tiny_model())
    assert weights_sha256(load_model(str(model_folder), device="cpu")) == expected
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_sha256(load_model(str(tmp_path / "sharded"), device="cpu")) == expected
    (tmp_path / "pickled").mkdir()
    shutil.copy(model_folder / "config.json", tmp_path / "pickled")
    torch.save(tiny_model().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert weights_sha256(load_model(str(tmp_path / "pickled"), device="cpu")) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hash_of_weights_changes_with_every_weight_and_type(architecture):
    model = tiny_model(architecture)
    seen = {weights_sha256(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.25
        seen.add(weights_sha256(model))
    seen.add(weights_sha256(model.bfloat16()))
    assert len(seen) == 2 + len(list(model.parameters()))


def test_the_hash_takes_turned_scalar_and_empty_weights():
    model = torch.nn.Module()
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    model.register_buffer("scalar", torch.tensor(3.0))
    model.register_buffer("empty", torch.zeros(0, 4))
    first = weights_sha256(model)
    model.turned = torch.arange(6.0).reshape(2, 3).T.contiguous()
    assert weights_sha256(model) == first
    model.scalar += 1
    second = weights_sha256(model)
    model.turned = model.turned.reshape(2, 3)
    assert len({first, second, weights_sha256(model)}) == 3
