"""Measuring while training: the figures, and that the training never notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import byte_level_tokenizer, tiny_model
from loku.data.encoding import IGNORE, Encoder, Example
from loku.data.prompts import TagTemplate
from loku.data.records import parse_rows
from loku.errors import InputError
from loku.evaluation.extraction import measure_extraction
from loku.levels import Level
from loku.watching import BEST, Watch, extraction, measure_sets, trained_parameters
from test_trainer import FORGET, RETAIN, examples, trainer

TOKENIZER = byte_level_tokenizer()
SETS = {"forget": [[row] for row in FORGET], "retain": [[row] for row in RETAIN]}
NEVER = Level({"probability": 0.0}, ("probability",), "test")


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in curve(folder)]


def watched(folder, model=None, *, sets=SETS, every=2, options=None, loss="ihl", **settings):
    """A trainer and what watches it, begun."""
    watch = Watch(folder, TOKENIZER, sets, every=every, **settings)
    run = trainer(folder, model, options=options, callbacks=[watch], forget_loss=loss)
    watch.begin(run.model)
    return run, watch


def trained(model):
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}


def same(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def dropping():
    """A model whose dropout draws random numbers at every step, trained as a whole."""
    return tiny_model("gpt2", resid_pdrop=0.2, embd_pdrop=0.1).requires_grad_(True)


def reference(model, windows):
    """The figures of one row, from whole float64 logits."""
    logprobs, hits, strengths = [], [], []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window.input_ids])).logits[0].double().log_softmax(-1)
        places = [i for i, label in enumerate(window.labels) if i and label != IGNORE]
        logprobs += [float(logits[i - 1, window.labels[i]]) for i in places]
        answer = [i for i in places if not (i == places[-1] and window.labels[i] == TOKENIZER.eos_token_id)]
        found = [int(logits[i - 1].argmax()) == window.labels[i] for i in answer]
        hits += found
        cut = max((k + 1 for k, hit in enumerate(found) if not hit), default=0)
        strengths.append(1 - cut / len(found))
    probability = float(torch.tensor(logprobs, dtype=torch.float64).mean().exp())
    return probability, sum(hits) / len(hits), sum(strengths) / len(strengths)


def test_the_figures_are_those_of_whole_logits():
    model = tiny_model()
    ids = torch.randint(3, 300, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    two_windows = [Example(0, part, [IGNORE, *part[1:]], 1, 1) for part in (ids[:20], ids[19:])]
    ended = [*FORGET[0].input_ids, TOKENIZER.eos_token_id]
    answered = Example(1, ended, [IGNORE] * 2 + ended[2:], 2, 2)
    rows = [two_windows, [answered], *([row] for row in examples(5, 3))]
    # Half of the tokens are made the model's own choice, so that hits are seen, too.
    with torch.no_grad():
        choices = model(torch.tensor([ids[:20]])).logits[0].argmax(-1).tolist()
    own = ids[:1] + choices[:1]
    rows.append([Example(9, own, [IGNORE, own[1]], 1, 1)])
    found, _ = measure_sets(model, TOKENIZER, {"forget": rows})
    expected = [reference(model, row) for row in rows]
    for position, name in enumerate(("probability", "exact_memorisation", "extraction_strength")):
        mean = sum(row[position] for row in expected) / len(rows)
        assert found["forget"][name] == pytest.approx(mean, rel=1e-5), name
    assert found["forget"]["exact_memorisation"] > 0
    assert set(found["forget"]) == {"probability", "exact_memorisation", "extraction_strength"}


def test_texts_have_ma_and_el_of_their_first_window():
    model, encoder = tiny_model(), Encoder(TOKENIZER, TagTemplate(), max_length=12)
    texts = parse_rows(
        [{"text": "The quick brown fox jumps over the lazy dog, 0123456789 times."}, {"text": "So ?"}], "x"
    )
    rows = [encoder.encode(text) for text in texts]
    assert len(rows[0]) > 1
    found, scores = measure_sets(model, TOKENIZER, {"forget": rows, "retain": rows}, text=True)
    alone = measure_extraction(model, TOKENIZER, [row[0] for row in rows], ngrams=(10,))
    assert found["forget"]["ma"] == pytest.approx(sum(row.ma for row in alone) / 2)
    assert "ma" not in found["retain"]
    el = extraction(model, TOKENIZER, rows, scores["forget"])
    assert el == {"el_10": alone[0].el[10]}  # the second text is too short to have one
    assert extraction(model, TOKENIZER, rows[1:], scores["forget"][1:]) == {}


@pytest.mark.parametrize("make", [lambda: None, dropping], ids=["adapter", "all weights with dropout"])
def test_measuring_does_not_change_a_bit_of_the_training(tmp_path, make):
    plain = trainer(tmp_path / "plain", make(), options={"grad_accum": 2})
    plain.train()
    run, _ = watched(
        tmp_path / "watched", make(), every=1, options={"grad_accum": 2}, level=NEVER, stop=True, share=0.0
    )
    flags = {name: p.requires_grad for name, p in run.model.named_parameters()}
    run.train()
    assert same(trained(plain.model), trained(run.model))
    assert {name: p.requires_grad for name, p in run.model.named_parameters()} == flags
    assert [line["step"] for line in curve(tmp_path / "watched")] == [0, 1, 2, 3]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "watched")]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]


def test_a_measurement_leaves_modes_and_random_states_as_they_were(tmp_path):
    model = dropping().train()
    model.transformer.h[0].eval()  # a module that is deliberately in another mode than its parent
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    watch = Watch(tmp_path, TOKENIZER, SETS, every=1)
    watch.begin(model)
    watch.record(model, 1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_last_step_is_measured_whatever_the_interval(tmp_path):
    run, watch = watched(tmp_path, every=4)
    run.train()
    assert [line["step"] for line in curve(tmp_path)] == [0, 4, 6]
    seconds = [line["seconds"] for line in curve(tmp_path)]
    assert seconds == sorted(seconds)
    assert not watch.stopped
    assert watch.best() is None


@pytest.mark.parametrize("make", [lambda: None, dropping], ids=["adapter", "all weights with dropout"])
def test_a_resumed_run_measures_and_keeps_the_same(tmp_path, make):
    options = {"save_steps": 1}
    whole, watch = watched(tmp_path / "whole", make(), every=1, options=options, level=NEVER, share=0.0)
    whole.args.save_total_limit = None
    copies = {}
    save = watch._prune
    watch._prune = lambda newest=None: (save(newest), copies.update({len(watch.curve): kept(tmp_path / "whole")}))
    whole.train()
    whole_last = trained(whole.model)
    watch.restore(whole.model)
    lines = (tmp_path / "whole" / "curve.jsonl").read_text().splitlines()
    for step in (1, 3, 5):
        folder = tmp_path / f"resumed{step}"
        folder.mkdir()
        (folder / "curve.jsonl").write_text("".join(line + "\n" for line in lines[: step + 1]))  # as rewound
        before = watch.curve[: step + 1]
        best = Watch(folder, TOKENIZER, SETS, every=1, level=NEVER, share=0.0)
        best.curve = before
        (folder / BEST).mkdir()
        for name, content in copies[step + 1].items():
            (folder / BEST / name).write_bytes(content)
        assert f"step-{best.best().step}.safetensors" in copies[step + 1]
        resumed, again = watched(folder, make(), every=1, options=options, level=NEVER, share=0.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}"))
        assert same(trained(resumed.model), whole_last)
        assert untimed(folder) == untimed(tmp_path / "whole")
        again.restore(resumed.model)
        assert same(trained(resumed.model), trained(whole.model))


def kept(folder):
    return {file.name: file.read_bytes() for file in (folder / BEST).glob("*.safetensors")}


def test_the_best_weights_are_those_of_their_step_and_no_more_than_two_are_kept(tmp_path):
    run, watch = watched(tmp_path, every=1, options={"save_steps": 2}, level=NEVER, share=0.0)
    seen, counts = {}, []
    record = watch.record

    def recorded(model, step):
        record(model, step)
        seen[step] = trained(model)
        counts.append(len(kept(tmp_path)))

    watch.record = recorded
    run.train()
    best = watch.best()
    assert best.meets
    assert max(counts) <= 2
    file = load_file(tmp_path / BEST / f"step-{best.step}.safetensors")
    assert same(file, seen[best.step])
    last = watch.curve[-1]["step"]
    with torch.no_grad():
        for parameter in trained_parameters(run.model).values():
            parameter.zero_()
    watch.restore(run.model)
    if best.step != last:
        assert same(trained(run.model), seen[best.step])


def test_an_earlier_best_measurement_is_put_back(tmp_path):
    run, watch = watched(tmp_path, every=1)
    run.train()
    figures = [line["forget"]["probability"] for line in curve(tmp_path)]
    aim = Level({"probability": figures[3]}, ("probability",), "test")  # so that step 3 of 6 is the best
    run, watch = watched(tmp_path / "best", every=1, level=aim, share=0.0)
    run.train()
    assert watch.best().step == 3
    last = trained(run.model)
    watch.restore(run.model)
    assert not same(trained(run.model), last)
    found, _ = measure_sets(run.model, TOKENIZER, SETS)
    assert found["forget"] == curve(tmp_path)[3]["forget"]


def test_missing_best_weights_are_refused_before_training(tmp_path):
    run, _ = watched(tmp_path, every=1, options={"save_steps": 1}, level=NEVER, share=0.0)
    run.train()
    for file in (tmp_path / BEST).iterdir():
        file.unlink()
    again = Watch(tmp_path, TOKENIZER, SETS, every=1, level=NEVER, share=0.0)
    with pytest.raises(InputError, match=r"lacks the weights of step \d+.*\nRestore the file under best/"):
        again.begin(run.model)


def test_the_training_stops_at_the_level_and_not_before(tmp_path):
    run, _ = watched(tmp_path / "whole", every=1, loss="grad_ascent")
    run.train()
    figures = [line["forget"]["probability"] for line in curve(tmp_path / "whole")]
    assert figures[0] > figures[3]
    level = Level({"probability": figures[3]}, ("probability",), "test")
    first = next(step for step, value in enumerate(figures) if value <= figures[3])
    run, watch = watched(tmp_path / "stopped", every=1, loss="grad_ascent", level=level, stop=True)
    run.train()
    assert watch.stopped
    assert run.state.global_step == first < 6
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")[: first + 1]


def test_two_processes_measure_what_one_does_and_stop_together(tmp_path):
    run, _ = watched(tmp_path / "whole", every=1, options={"epochs": 3.0, "learning_rate": 3e-3, "save_steps": -1})
    run.train()
    one = curve(tmp_path / "whole")
    # Between two steps, and nearer to the last: no rounding decides.
    level = 0.3 * one[3]["forget"]["probability"] + 0.7 * one[4]["forget"]["probability"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(Path(__file__).parent / "watch_in_processes.py")]
    outcome = subprocess.run(
        [*command, str(tmp_path / "two"), str(level)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    two = curve(tmp_path / "two")
    assert [line["step"] for line in two] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(one, two, strict=False):
        for name in ("forget", "retain"):
            assert theirs[name]["probability"] == pytest.approx(ours[name]["probability"], rel=1e-3)
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["best"] == 4
