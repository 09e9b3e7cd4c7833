"""Every bad input gets the named error that API.md promises: which argument, what was expected, what came."""

from __future__ import annotations

import pytest
import torch

import distilkernels as dk

Z = torch.randn(2, 3, 11)
IDS = torch.arange(4).expand(2, 3, 4)
TEACHER = dk.capture_topk(torch.randn(2, 3, 11), 4)


def loss(z=Z, teacher=TEACHER, **options):
    return dk.topk_distill_loss(z, teacher, **options)


@pytest.mark.parametrize("call,error,message", [
    (lambda: loss(z="logits"), TypeError, "student_logits must be a tensor; got str"),
    (lambda: loss(z=Z.long()), TypeError, "student_logits must be float32, bfloat16, float16 or float64; got torch.int64"),
    (lambda: loss(z=torch.zeros(2, 3, 0)), ValueError, "V ≥ 1"),
    (lambda: loss(teacher=IDS), TypeError, "teacher must be a TeacherTopK; got Tensor"),
    (lambda: loss(z=Z[:1]), ValueError, r"teacher must have the student's token shape \(1, 3\); got \(2, 3\)"),
    (lambda: loss(z=Z[..., :3]), ValueError, r"K in \[1, 3\], the columns of the logits; got K = 4"),
    (lambda: loss(z=Z[..., :4]), ValueError, r"teacher.ids\[\d, \d\] is \d+; teacher.ids must be in \[0, 4\) or -1 for an empty slot"),
    (lambda: loss(temperature=2.0), ValueError, "temperature is 2.0 but the teacher's log-probs were taken at 1.0"),
    (lambda: loss(temperature=0), ValueError, "temperature must be positive; got 0"),
    (lambda: loss(temperature="hot"), TypeError, "temperature must be a number; got str"),
    (lambda: loss(temperature=float("nan")), ValueError, "temperature must be finite"),
    (lambda: loss(softcap=-1.0), ValueError, "softcap must be positive"),
    (lambda: loss(logit_scale=float("inf")), ValueError, "logit_scale must be finite"),
    (lambda: loss(valid_vocab=12), ValueError, r"valid_vocab must be in \[1, 11\]"),
    (lambda: loss(valid_vocab=3.5), TypeError, "valid_vocab must be an int"),
    (lambda: loss(divergence="kl"), ValueError, "divergence must be one of forward_kl, .* got 'kl'"),
    (lambda: loss(divergence=1), TypeError, "divergence must be a name or a callable"),
    (lambda: loss(tail="ignore"), ValueError, "tail must be one of bucket, .* got 'ignore'"),
    (lambda: loss(reduction="avg"), ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
    (lambda: loss(token_weights=torch.ones(2)), ValueError, r"token_weights must have the token shape \(2, 3\); got \(2,\)"),
    (lambda: loss(token_weights=1.0), TypeError, "token_weights must be a tensor"),
    (lambda: loss(labels=torch.zeros(2, 3), ce_weight=1.0), TypeError, "labels must be an int32 or int64 tensor; got torch.float32"),
    (lambda: loss(labels=torch.zeros(2, 2, dtype=torch.int64), ce_weight=1.0), ValueError, "labels must have the token shape"),
    (lambda: loss(labels=torch.full((2, 3), 11), ce_weight=1.0), ValueError, r"labels\[0, 0\] is 11"),
    (lambda: loss(labels=torch.full((2, 3), -1), ce_weight=1.0), ValueError, r"labels\[0, 0\] is -1; labels must be in \[0, 11\) or -100 for an ignored"),
    (lambda: loss(labels=torch.zeros(2, 2), ce_weight=0.0), TypeError, "labels must be an int32 or int64 tensor"),
    (lambda: loss(ce_weight=0.5), ValueError, "ce_weight=0.5 needs labels"),
    (lambda: loss(ce_weight="a"), TypeError, "ce_weight must be a number"),
    (lambda: loss(ce_weight=float("nan")), ValueError, "ce_weight must be finite"),
    (lambda: loss(ignore_index=None), TypeError, "ignore_index must be an int"),
    (lambda: loss(num_items_in_batch=-3), ValueError, "num_items_in_batch must not be negative"),
    (lambda: loss(num_items_in_batch="a"), TypeError, "num_items_in_batch must be a number"),
    (lambda: loss(num_items_in_batch=torch.ones(3)), ValueError, "num_items_in_batch must be one number"),
    (lambda: loss(divergence=dk.divergences.ForwardKL), TypeError, r"divergence must be an instance, ForwardKL\(\)"),
    (lambda: loss(divergence=lambda p, q: p - q), ValueError, "divergence must return one value per row"),
    (lambda: loss(divergence=dk.divergences.JSD(torch.tensor(1.0)), tail="drop"), ValueError, "is refused"),
    (lambda: loss(tail="renormalize", backend="cuda"), dk.BackendError, "backend 'cuda' cannot serve"),
    (lambda: dk.divergences.JSD(torch.tensor([0.5, 2.0])), ValueError, r"JSD: beta must be in \[0, 1\]; got values from 0.5 to 2.0"),
    (lambda: dk.divergences.JSD("a"), TypeError, "JSD: beta must be a number or a tensor"),
    (lambda: dk.divergences.AlphaBeta(torch.tensor([0.5, 0.0])), ValueError, "alpha must not be 0"),
    (lambda: dk.TeacherTopK([1], [2.0]), TypeError, "ids must be a tensor"),
    (lambda: dk.TeacherTopK(IDS, IDS.float(), IDS[..., 0]), TypeError, "tail_logprob must be floating point"),
    (lambda: TEACHER.truncate(2.5), TypeError, "k must be an int"),
    (lambda: TEACHER.retemper("a"), TypeError, "temperature must be a number"),
    (lambda: dk.TeacherTopK.cat([TEACHER, 3]), TypeError, "teachers must hold TeacherTopK; got int"),
    (lambda: dk.TeacherTopK.cat([TEACHER, TEACHER], dim=-3), ValueError, "dim must be one of the 2 token dimensions"),
    (lambda: dk.row_loss(Z, None, 3), TypeError, "fn must be a function"),
    (lambda: dk.row_loss(Z, None, lambda s: s.lse[:2], want="lse", reduction="none"), ValueError, "one loss per row"),
    (lambda: dk.row_loss(Z, None, lambda s, x: s.lse, want="lse", per_token=[1]), TypeError, "per_token must hold tensors; got int"),
    (lambda: loss(z=Z[:, :1].expand(2, 3, 11), inplace_backward=True), ValueError, "rows do not share memory"),
    (lambda: loss(backend="fast"), ValueError, "backend must be one of cuda, triton, cpp, reference; got 'fast'"),
    (lambda: loss(backend="cuda"), dk.BackendError, "backend 'cuda' cannot serve vocab_stats: "),
    (lambda: dk.vocab_stats(Z, want=("lse", "entropy")), ValueError, r"unknown statistics \['entropy'\]"),
    (lambda: dk.vocab_stats(Z, want=("rank",)), ValueError, r"want=\['rank'\] needs ids"),
    (lambda: dk.vocab_stats(Z, IDS.float()), TypeError, "ids must be int32 or int64"),
    (lambda: dk.vocab_stats(Z, IDS[:1]), ValueError, r"ids must have shape \(2, 3, 'K'\)"),
    (lambda: dk.vocab_stats(Z, IDS + 9), ValueError, r"ids\[0, 2\] is 11"),
    (lambda: dk.vocab_stats(Z, IDS - 3), ValueError, r"ids\[0, 0\] is -3"),
    (lambda: dk.vocab_stats(Z, IDS, want="lse").entropy, ValueError, "entropy needs want"),
    (lambda: dk.token_logprobs(Z, [1, 2]), TypeError, "ids must be a tensor"),
    (lambda: dk.row_loss(Z, None, lambda s: s.lse, want="lse", per_token=[torch.zeros(3)]), ValueError, "per_token tensors must start"),
    (lambda: dk.capture_topk(Z, 0), ValueError, r"k must be in \[1, 11\]"),
    (lambda: dk.capture_topk(Z, 2.0), TypeError, "k must be an int"),
])  # fmt: skip
def test_named_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("tail", ["renormalize_teacher", "drop"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_reverse_kl", dk.divergences.JSD(1.0), "adaptive_kl"], ids=str)
def test_refused_pairs_say_why(divergence, tail):
    with pytest.raises(ValueError, match=f"tail='{tail}' is refused: .* Use tail='bucket' or 'renormalize'"):
        loss(divergence=divergence, tail=tail)


def test_the_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("DISTILKERNELS_BACKEND", "reference")
    assert dk.backends.resolve("vocab_stats", Z).__module__.endswith("primitives.vocab_stats")
    monkeypatch.setenv("DISTILKERNELS_BACKEND", "cuda")
    with pytest.raises(dk.BackendError, match="CUDA C"):
        loss()


def test_support_table_has_a_sentence_for_every_refusal():
    rows = dk.backends.support()
    assert {r.primitive for r in rows} == set(dk.backends.PRIMITIVES) and {r.backend for r in rows} == set(dk.backends.ORDER)
    for r in rows:
        assert r.refusal is None or len(r.refusal.split()) >= 4, r
    assert all((r.refusal is None) == (not r.primitive.startswith("linear")) for r in rows if r.backend == "reference")


def test_ids_on_another_device():
    with pytest.raises(ValueError, match="ids must be on cpu, where the logits are; got meta"):
        dk.vocab_stats(Z, IDS.to("meta"))
