"""What is trained on packed rows equals what is trained on padded ones: values and gradients, in float64."""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import flash_attention_mask

from builders import ARCHITECTURES, byte_level_tokenizer, tiny_model
from loku.adapters.anchor import attach
from loku.adapters.initialisers import fila
from loku.adapters.layers import target_layers, weight
from loku.config import UnlearnOptions
from loku.data.encoding import IGNORE, Example
from loku.errors import InputError
from loku.forward import Forward
from loku.guarded_trainer import training_arguments
from loku.losses.hinge import inverted_hinge
from loku.losses.table import FORGET_LOSSES, RETAIN_LOSSES
from loku.trainer import UnlearnTrainer

PAD = byte_level_tokenizer().pad_token_id


def examples(count, seed, *, longest=40, weighted=False):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        weights = tuple(torch.rand(length, generator=generator).round(decimals=1).tolist()) if weighted else None
        made.append(Example(index, ids, [IGNORE] * 2 + ids[2:], 2, 2, weights))
    return made


def others(rows, seed):
    return [
        [Example(row.index, [*row.input_ids[:2], 9 + seed, 8, 7], [IGNORE, IGNORE, 9 + seed, 8, 7], 2, 2)]
        for row in rows
    ]


FORGET, RETAIN = examples(6, 0), examples(7, 1)
ALTERNATES = {"alternates": others(FORGET, 1), "retain_alternates": others(RETAIN, 2)}


def adapted(architecture="llama", **settings):
    model = tiny_model(architecture, **settings).double()
    layers = target_layers(model)
    factors = {n: fila(weight(x), torch.ones(len(weight(x))), rank=4, scaling=2.0) for n, x in layers.items()}
    found = attach(model, layers, factors, rank=4, alpha=8.0)
    for name, parameter in found.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.double()
            if ".default." in name:
                parameter.data += (
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
                )
    return found


def trainer(folder, model, *, forget=FORGET, retain=RETAIN, batch_size=6, **settings):
    options = UnlearnOptions(batch_size=batch_size, save_steps=-1, warmup_steps=0, device="cpu").as_dict()
    return UnlearnTrainer(
        model, training_arguments(folder, 1, **options), forget=forget, retain=retain, pad_id=PAD, **settings
    )


def step(run, *, batch_size=6):
    """One optimiser step's losses and gradients."""
    places = list(range(len(run.train_dataset)))
    batches = [
        run.data_collator([run.train_dataset[i] for i in places[k : k + batch_size]])
        for k in range(0, len(places), batch_size)
    ]
    items = run._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = 0.0
    for last, batch in enumerate(batches, start=1):
        run.accelerator.gradient_state._set_sync_gradients(last == len(batches))
        loss += float(run.training_step(run.model, batch, items))
    gradients = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    return loss, gradients


def agree(one, other, exact=1e-9):
    assert one[0] == pytest.approx(other[0], rel=exact)
    assert float((one[1] - other[1]).norm()) <= exact * float(other[1].norm())
    assert float(other[1].norm()) > 0


@pytest.fixture(autouse=True)
def in_float64():
    """Where the trainer makes tensors of its own, they are float64, so that nothing but rounding is left."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


PAIRS = [(name, "nll") for name in FORGET_LOSSES] + [("ihl", name) for name in RETAIN_LOSSES if name != "nll"]


@pytest.mark.parametrize(("loss", "retain_loss"), PAIRS)
@pytest.mark.parametrize("batch_size", [6, 4])
def test_every_loss_is_that_of_padded_rows_and_whole_logits(tmp_path, loss, retain_loss, batch_size):
    found = {}
    for name, more in (("packed", {}), ("padded", {"packed": False}), ("plain", {"plain_head": True})):
        run = trainer(tmp_path, adapted(), forget_loss=loss, retain_loss=retain_loss, **more, **ALTERNATES)
        found[name] = step(run, batch_size=batch_size)
    agree(found["packed"], found["plain"])
    agree(found["padded"], found["plain"])


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class NothingWaits(TorchDispatchMode):
    """Refuses every operation that would hold up a GPU: a number read on the host, a size that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        assert not masked, "the step waits for the size of a selection"
        assert not name.startswith(WAITS), f"the step waits for {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch):
    def refuse(self, *args, **more):
        raise AssertionError("the step copies a tensor to the host")

    with monkeypatch.context() as patch, NothingWaits():
        for name in ("item", "cpu", "tolist", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize(("loss", "retain_loss"), PAIRS)
def test_nothing_in_a_micro_batch_waits_for_the_device(tmp_path, monkeypatch, loss, retain_loss):
    run = trainer(tmp_path, adapted(), forget_loss=loss, retain_loss=retain_loss, batch_size=3, **ALTERNATES)
    batches = [run.data_collator([run.train_dataset[i] for i in places]) for places in ((0, 1, 2), (3, 4, 5))]
    items = run._get_num_items_in_batch(batches, torch.device("cpu"))
    run.training_step(run.model, batches[0], items)  # values of the target model are copied once, at the first step
    with nothing_waits(monkeypatch):
        run.training_step(run.model, batches[1], items)
    assert sum(float(p.grad.norm()) for p in run.model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(
    "wait", [float, bool, torch.nonzero, lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0]]
)
def test_what_waits_is_seen(monkeypatch, wait):
    with pytest.raises(AssertionError, match="the step"), nothing_waits(monkeypatch):
        wait(torch.ones(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_packs(tmp_path, architecture):
    runs = {
        name: trainer(tmp_path, adapted(architecture), **more)
        for name, more in (("packed", {}), ("plain", {"plain_head": True}))
    }
    assert runs["packed"].objective.forward.layout.kind == "packed"
    batch = runs["packed"].data_collator([runs["packed"].train_dataset[i] for i in range(6)])
    assert any("lasts" in block for block in batch["blocks"])
    for run in runs.values():
        run.model.config.use_cache = False
    agree(step(runs["packed"]), step(runs["plain"]))


@pytest.mark.parametrize("settings", [
    {"architecture": "gpt_neo", "window_size": 40},
    {"architecture": "gemma3_text", "sliding_window": 40},
    {"architecture": "mistral", "sliding_window": 40},
], ids=lambda s: s["architecture"])  # fmt: skip
def test_sequences_longer_than_a_window_stand_on_their_own(tmp_path, settings):
    forget, retain = examples(5, 2, longest=39), examples(5, 3, longest=39)
    forget[2] = Example(2, list(range(3, 73)), [IGNORE] * 2 + list(range(5, 73)), 2, 2)
    found = {}
    for name, more in (("packed", {}), ("plain", {"plain_head": True})):
        run = trainer(tmp_path, adapted(**settings), forget=forget, retain=retain, batch_size=5, **more)
        if name == "packed":
            blocks = run.data_collator([run.train_dataset[i] for i in range(5)])["blocks"]
            assert [block["input_ids"].shape[1] <= 40 for block in blocks if "lasts" in block] == [True]
            assert any(block["input_ids"].shape[1] == 69 for block in blocks)
        found[name] = step(run, batch_size=5)
    agree(found["packed"], found["plain"])


@pytest.mark.parametrize("options", [{"stop": 0.01}, {"beta": 1.0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_ihls_options_and_weighted_tokens(tmp_path, options, weighted):
    forget = examples(6, 4, weighted=weighted)
    level = [torch.full((sum(x != IGNORE for x in e.labels[1:]),), -5.7) for e in forget]
    found = [
        step(trainer(tmp_path, adapted(), forget=forget, forget_options=options, level=level, **more), batch_size=4)
        for more in ({}, {"plain_head": True})
    ]
    agree(*found)


@pytest.mark.parametrize("combine", ["pcgrad", "gru"])
def test_gradients_that_are_combined_come_from_passes_of_their_own(tmp_path, combine):
    found = []
    for more in ({}, {"plain_head": True}):
        run = trainer(tmp_path, adapted(), combine=combine, forget_loss="grad_ascent", **more)
        assert not run.data_collator.plan.together
        found.append(step(run, batch_size=3))
    agree(*found)


def test_all_weights_too(tmp_path):
    found = []
    for more in ({}, {"plain_head": True}):
        model = tiny_model().double()
        model.requires_grad_(True)
        found.append(step(trainer(tmp_path, model, **more), batch_size=4))
    agree(*found)


def test_checkpointed_activations_change_nothing(tmp_path):
    found = []
    for checkpointed in (False, True):
        model = adapted()
        if checkpointed:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable()
        found.append(step(trainer(tmp_path, model), batch_size=4))
    agree(*found)


def test_one_pass_for_both_sides_unless_a_loss_wants_more(tmp_path):
    def together(**settings):
        return trainer(tmp_path, adapted(), **settings, **ALTERNATES).data_collator.plan.together

    assert together()
    assert together(forget_loss="dpo", retain_loss="ap")
    assert not together(retain_loss="kl")
    assert not together(forget_loss="rmu")
    assert not together(forget_loss=inverted_hinge)
    assert not together(combine="gru")
    assert not together(forget_weight=0.0)


def test_references_are_those_of_padded_rows(tmp_path):
    forward = Forward(model := adapted())
    from loku.target_values import TargetValues

    packed = TargetValues(model, forward, copies=False).token_logprobs(FORGET, pad_id=PAD, batch_size=4)
    plain = TargetValues(model, Forward(model, plain=True), copies=False).token_logprobs(FORGET, pad_id=PAD)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_labels_outside_the_vocabulary_are_refused_before_the_first_step(tmp_path):
    bad = [Example(0, [3, 4, 99999], [IGNORE, 4, 99999], 1, 1)]
    with pytest.raises(InputError, match=r"A label lies outside the vocabulary of \d+ tokens: .* 99999"):
        trainer(tmp_path, adapted(), forget=bad)


def causal_from(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=400, pad_token_id=PAD, bos_token_id=0, eos_token_id=0, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


UNPACKABLE = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi: positions come from the mask
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # a state runs on over the row
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_that_cannot_pack_are_found_out_and_padded(tmp_path, kind):
    found = []
    for more in ({}, {"plain_head": True}):
        model = causal_from(kind, **UNPACKABLE[kind]).double()
        model.requires_grad_(True)
        run = trainer(tmp_path, model, layer=0, **more)
        if not more:
            assert run.objective.forward.layout.kind == "padded"
            assert run.objective.forward.padded_because
        found.append(step(run, batch_size=6))
    agree(*found, exact=1e-7)


def borders_attention(module, query, key, value, attention_mask, scaling=None, seen=None, **kwargs):
    """Attention of sequences side by side by the borders that flash kernels take, in plain products."""
    borders = kwargs.get("cu_seq_lens_q")
    assert attention_mask is None
    borders = [0, query.shape[2]] if borders is None else borders.tolist()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen.append(borders)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in itertools.pairwise(borders)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attends", [True, False], ids=["reads the borders", "ignores them"])
def test_flash_kernels_get_borders_and_are_checked(tmp_path, attends, monkeypatch):
    expected = step(trainer(tmp_path, adapted(), plain_head=True))
    seen = []
    name = f"stand_in_{attends}"  # transformers would look for the kernels of a name with flash in it
    monkeypatch.setattr("loku.layouts._takes_borders", lambda model: True)
    kernel = functools.partial(borders_attention, seen=seen)
    if not attends:
        kernel = lambda *a, **k: borders_attention(*a, **{**k, "cu_seq_lens_q": None}, seen=seen)  # noqa: E731
    AttentionInterface.register(name, kernel)
    AttentionMaskInterface.register(name, flash_attention_mask)
    model = adapted()
    model.get_base_model().set_attn_implementation(name)
    run = trainer(tmp_path, model)
    assert run.objective.forward.layout.kind == ("flash" if attends else "padded")
    if attends:
        seen.clear()
        agree(step(run), expected)
        assert {len(borders) for borders in seen} == {13}  # 6 forget and 6 retain rows in one pass
    else:
        assert "not those of the sequences" in run.objective.forward.padded_because
