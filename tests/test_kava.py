"""The KaVa example: its problems, its Jacobi iteration, where its gradients go, and a run of a few steps."""

from __future__ import annotations

import csv
import re

import pytest
import torch

from distilkernels import kv

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import arithmetic, kava, latent

SIZE = latent.Size(hidden=32, layers=2, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def batch():
    return arithmetic.problems(40, steps=4, seed=3)[:6]


def student(latents=3, updates=2, seed=0):
    return latent.LatentStudent(latent.causal_lm(SIZE, seed).double(), latents, updates).double()


def test_problems_are_solved_line_by_line():
    every = arithmetic.problems(500, steps=4, seed=1)
    assert len(every) > 400 and len(every.question.unique(dim=0)) == len(every)
    for row in range(0, len(every), 7):
        question, thought = re.fullmatch(r"(.*) think: (.*) answer: \d", every.text(row)).groups()
        value, *operations = question.split()
        value = int(value)
        for before, operation, after in re.findall(r"(\d) (\S+) = (\d)", thought):
            assert (before, operation) == (str(value), operations.pop(0))
            value = int(eval(before + operation)) % arithmetic.MODULUS
            assert after == str(value)
        assert not operations and value == every.answer[row]


def test_held_out_questions_are_new():
    data = kava.prepare(2, seed=0, heldout=100)
    both = torch.cat([data.train.question, data.heldout.question])
    assert len(data.heldout) == 100 and len(both.unique(dim=0)) == len(both)


@torch.no_grad()
def test_as_many_updates_as_latents_are_the_sequential_chain(batch):
    """After M updates the Jacobi iteration has what writing one latent after the other gives; after one it has not."""
    model = student(latents=4, updates=4)
    embed, inputs = model.model.get_input_embeddings(), None
    inputs = embed(batch.question)
    for _ in range(4):
        last = model.model.model(inputs_embeds=inputs).last_hidden_state[:, -1:]
        inputs = torch.cat([inputs, model.feedback(last)], 1)
    inputs = torch.cat([inputs, embed(torch.full_like(batch.question[:, :1], arithmetic.ANSWER))], 1)
    want = model.model(inputs_embeds=inputs).logits[:, -1]
    torch.testing.assert_close(model(batch.question).logits, want)
    model.num_updates = 1
    assert (model(batch.question).logits - want).abs().max() > 1e-3


def test_alignment_moves_the_latents_and_not_the_teacher(batch):
    teacher, ours = latent.causal_lm(SIZE, 1).double(), student()
    trace = latent.read(teacher, batch)
    assert trace.logits.requires_grad and trace.cache[0][0].requires_grad
    kept = latent.targets(trace, kv.KaVa(), ours.num_latents, teacher.model.rotary_emb.inv_freq)
    start, stop = trace.span
    assert stop - start == 3 * arithmetic.LINE
    for one in kept:
        assert (one.selection.indices >= start).all() and (one.selection.indices < stop).all()
        assert not one.keys.requires_grad and not one.values.requires_grad
    thought = ours(batch.question)
    loss = kv.alignment_loss(thought.latents, kept, normalize="layer_std")
    loss = loss + kv.hidden_alignment_loss(thought.hidden, trace.hidden, positions=torch.zeros(len(batch), dtype=torch.int64))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name in ("start", "feedback.0.weight", "feedback.3.weight", "model.model.layers.0.self_attn.q_proj.weight"):
        gradient = ours.get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_targets_are_the_teachers_own_entries_at_the_latents_positions(batch):
    """With nothing dropped and nothing moved, the targets are the cache; moved, they are what the model caches there."""
    teacher = latent.causal_lm(SIZE, 1)
    with torch.no_grad():
        trace = latent.read(teacher, batch)
        start, stop = trace.span
        whole = latent.targets(trace, kv.Crop(), stop - start, teacher.model.rotary_emb.inv_freq)
        for (keys, values), kept in zip(trace.cache, whole):
            torch.testing.assert_close(kept.keys, keys[:, :, start:stop], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(kept.values, values[:, :, start:stop])
        few = latent.targets(trace, kv.AttentionOnly(), 2, teacher.model.rotary_emb.inv_freq)[0]
        # layer 0 knows no other tokens: its keys at a position are those of the word alone
        ids = torch.cat([batch.question, batch.thought], 1)
        for row in range(len(batch)):
            for head in range(SIZE.kv_heads):
                chosen = few.selection.indices[row, head].long()
                there = torch.cat([batch.question[row, :start], ids[row, chosen]])[None]
                want = teacher.model(there, use_cache=True).past_key_values.layers[0].keys[0, head, start:]
                torch.testing.assert_close(few.keys[row, head], want, rtol=1e-4, atol=1e-5)


def test_the_objective_is_the_sum_of_its_parts(batch):
    ours = student()
    losses = kava.latent_losses(ours, batch, kv.KaVa())
    assert all(part.isfinite() and part > 0 for part in losses)
    torch.testing.assert_close(losses.total(3.0, 5.0), losses.student + losses.teacher + 3 * losses.hidden + 5 * losses.kv)
    without = kava.latent_losses(ours, batch, None)
    assert without.kv is None
    torch.testing.assert_close(without.total(3.0), losses.total(3.0, 0.0))
    losses.total().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_a_run_of_two_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kava, "HELDOUT", 32)
    monkeypatch.setattr(kava, "START_STEPS", 40)
    results = kava.main(["--steps", "2", "--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    explicit = arithmetic.LINE * (kava.OPERATIONS - 1) + 2
    passes = {"thought": explicit, "direct": 1, "latent": kava.UPDATES + 1}
    for variant, result in zip((kava.START, *kava.VARIANTS), results, strict=True):
        assert result.variant == variant and result.passes == passes[variant.mode]
        assert len(result.accuracy) == 1 and 0 <= result.accuracy[0] <= 1
        assert [step for step, _ in result.curve] == ([] if variant == kava.START else [0, 1, 2])
        assert re.search(rf"^{re.escape(variant.name)} +[\d.]+% +{result.passes}$", said, flags=re.M)
    with (tmp_path / "kava.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [r.accuracy[0] for r in results]
    assert (tmp_path / "kava.png").stat().st_size > 10_000
