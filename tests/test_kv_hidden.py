"""Losses between hidden states at chosen tokens, and latents appended to a cache, against torch's own forms."""

from __future__ import annotations

import pytest
import torch
from test_kv_align import KINDS, layers

from distilkernels import kv

# ---------------------------------------------------------------------------------------- hidden states


def test_codi_is_the_token_before_the_answer():
    student, teacher = ([torch.randn(3, n, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)] for n in (5, 9))
    mine, theirs = torch.tensor([4, 2, 0]), torch.tensor([8, 8, 3])
    for loss, f in (("smooth_l1", torch.nn.functional.smooth_l1_loss), ("l1", torch.nn.functional.l1_loss), ("mse", torch.nn.functional.mse_loss)):
        want = 0
        for s, t in zip(student, teacher):
            a, b = s[torch.arange(3), mine], t[torch.arange(3), theirs].detach()
            want = want + f(a, b) / (b.var() if loss == "mse" else b.std()) / 4
        got = kv.hidden_alignment_loss(student, teacher, positions=(mine, theirs), loss=loss)
        torch.testing.assert_close(got, want)
        for x, y in zip(torch.autograd.grad(got, student), torch.autograd.grad(want, student)):
            torch.testing.assert_close(x, y)
    assert all(t.grad is None for t in teacher)


def test_implicit_cot_is_the_diagonal():
    student, teacher = [torch.randn(2, 6, 8) for _ in range(3)], [torch.randn(2, 12, 8) for _ in range(5)]
    diagonal = kv.diagonal_positions(torch.tensor([1, 3]), torch.tensor([12, 6]), 3)
    assert diagonal[..., 0].tolist() == [[1, 3], [6, 4], [11, 5]]
    last = torch.tensor([5, 2])
    got = kv.hidden_alignment_loss(student, teacher, positions=(last, diagonal), loss="mse", normalize="inputs", layer_map=[0, 2, 4], reduction="none")
    for i, t in enumerate((0, 2, 4)):
        a, b = student[i][torch.arange(2), last], teacher[t][torch.arange(2), diagonal[i, :, 0]]
        torch.testing.assert_close(got[i], torch.nn.functional.mse_loss(a / a.std(), b / b.std()))


def test_an_exit_mask_leaves_tokens_out_by_layer():
    student, teacher = [torch.randn(2, 6, 8, requires_grad=True) for _ in range(3)], [torch.randn(2, 6, 8) for _ in range(3)]
    positions = torch.arange(6).expand(2, 6)
    alive = torch.rand(3, 2, 6) > torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    got = kv.hidden_alignment_loss(student, teacher, positions=positions, mask=alive, normalize=None, reduction="none")
    for i in range(3):
        want = torch.nn.functional.smooth_l1_loss(student[i][alive[i]], teacher[i][alive[i]]) if alive[i].any() else torch.tensor(0.0)
        torch.testing.assert_close(got[i], want)
    nowhere = kv.hidden_alignment_loss(student, teacher, positions=torch.full((2,), -1))
    nowhere.backward()
    assert nowhere == 0 and all((s.grad == 0).all() for s in student)


def test_no_tokens_at_all_are_an_attached_zero():
    """As positions that are nowhere are; a position in them is an error."""
    student, teacher = [torch.randn(2, 0, 8, requires_grad=True) for _ in range(2)], [torch.randn(2, 5, 8) for _ in range(2)]
    for positions in (torch.full((2, 3), -1), torch.empty(2, 0, dtype=torch.int64)):
        loss = kv.hidden_alignment_loss(student, teacher, positions=positions)
        assert loss == 0 and torch.autograd.grad(loss, student)[0].shape == (2, 0, 8)
    with pytest.raises(ValueError, match="positions of the student must be below its 0 tokens; got 0"):
        kv.hidden_alignment_loss(student, teacher, positions=torch.zeros(2, dtype=torch.int64))


def test_hidden_gradcheck():
    student, teacher = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)], [torch.randn(2, 5, 3).double() for _ in range(2)]
    positions = torch.tensor([[0, 3, -1], [2, 2, 1]]), torch.tensor([[4, 1, 0], [0, 2, 3]])
    for loss, normalize in KINDS:
        options = {"positions": positions, "loss": loss, "normalize": normalize}
        assert torch.autograd.gradcheck(lambda *s, o=options: kv.hidden_alignment_loss(s, teacher, **o), student)


# ---------------------------------------------------------------------------------------- latents


def test_append_latents_is_differentiable_and_turned_to_its_positions():
    keys, values = torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    latent_k, latent_v = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    got = kv.append_latents(keys, values, latent_k, latent_v, torch.tensor([2, 5, 6]))
    assert got.positions.tolist() == [[0, 1, 2, 3, 4, 2, 5, 6]] * 2
    assert torch.equal(got.keys[:, :, :5], keys) and torch.equal(got.values[:, :, 5:], latent_v.expand(2, 2, 3, 6))
    rope = kv.Rope(torch.tensor([1.0, 0.1, 0.03, 0.01]))
    positions = torch.tensor([[2, 5, 6], [40, 3, 0]])
    turned = kv.append_latents(keys, values, latent_k, latent_v, positions, rotate=rope, cached_positions=torch.arange(5).expand(2, 5) + 9)
    assert turned.positions[1].tolist() == [9, 10, 11, 12, 13, 40, 3, 0]
    angle = positions[:, None, :, None].float() * rope.inv_freq
    a, b = latent_k.expand(2, 2, 3, 8).chunk(2, -1)
    want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    torch.testing.assert_close(turned.keys[:, :, 5:], want)
    run = lambda *t: kv.append_latents(*t, positions, rotate=rope)[:2]
    assert torch.autograd.gradcheck(run, (keys, values, latent_k, latent_v))


H = [torch.randn(2, 3, 4)] * 2
LAST = torch.tensor([0, 1])
S = layers(2)


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.hidden_alignment_loss(H[0], H, positions=LAST), TypeError, "student_hidden must be a non-empty sequence"),
    (lambda: kv.hidden_alignment_loss([H[0][0]], H, positions=LAST), ValueError, "student_hidden must hold floating point tensors"),
    (lambda: kv.hidden_alignment_loss(H, H, positions=LAST + 2), ValueError, "positions of the student must be below its 3 tokens; got 3"),
    (lambda: kv.hidden_alignment_loss(H, H, positions=LAST.float()), TypeError, "positions of the student must be an int tensor"),
    (lambda: kv.hidden_alignment_loss(H, H, positions=(LAST, LAST[:, None].expand(2, 2))), ValueError, "student and teacher must be as many; got 1 and 2"),
    (lambda: kv.hidden_alignment_loss(H, H, positions=torch.zeros(3, dtype=torch.int64)), ValueError, r"must have shape \(2,\), \(2, P\) or \(2, 2, P\)"),
    (lambda: kv.append_latents(*S[0], S[0][0][:, :, :2], S[0][1], torch.tensor([0, 1])), ValueError, "latent_v must have shape"),
    (lambda: kv.append_latents(*S[0], *S[0], torch.zeros(7)), ValueError, "positions must be an int tensor"),
    (lambda: kv.append_latents(*S[0], *S[0], torch.arange(7), rotate=1.0), TypeError, "rotate must be a Rope"),
    (lambda: kv.append_latents(*S[0], *S[0], [0, 1]), TypeError, "positions must be an int tensor"),
    (lambda: kv.append_latents(*S[0], *S[0], torch.zeros(3, 7).long()), ValueError, r"positions must have shape \(7,\) or \(2, 7\)"),
    (lambda: kv.append_latents(S[0][0], S[0][1][:, :, :2], *S[0], torch.arange(7)), ValueError, "values must share keys'"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
