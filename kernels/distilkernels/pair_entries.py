"""What one entry of two rows gives to a second look at them, from log p and log q: device functions of ``pair_stats``."""

from __future__ import annotations

import triton
import triton.language as tl

from .head import exp
from .vocab_stats import _FAR, _INF


@triton.jit
def two_parts(x):
    """A double as two floats whose sum it is: (z − high) − low is exact near x."""
    high = x.to(tl.float32)
    low = (x - high).to(tl.float32)
    return high, tl.where((high > -_INF) & (high < _INF), low, 0.0)


@triton.jit
def _log(x):
    """log of x in (0, 1]; near 1, where the device's own is exact to 2⁻²² of 1 and not of the result, by its series."""
    s = (x - 1.0) / (x + 1.0)
    a = s * s
    series = 2.0 * s * (1.0 + a * (1.0 / 3 + a * (1.0 / 5 + a * (1.0 / 7))))
    return tl.where(x > 0.75, series, tl.log(x))


@triton.jit
def mixed(log_p, log_q, w, rest):
    """p, q, log p/m, log q/m, r = (1 − w)·q/m of m = w·p + (1 − w)·q, and where it is not 0; counted from the larger of the two."""
    gap = log_p - log_q
    teachers = gap > 0
    high = exp(tl.maximum(log_p, log_q))
    counts = high > 0
    below = tl.where(counts, tl.maximum(-tl.abs(gap), _FAR), 0.0)
    ratio = exp(below)
    share, other = tl.where(teachers, w, rest), tl.where(teachers, rest, w)
    mass = share + other * ratio
    log_mass = _log(mass)
    low = high * ratio
    p, q = tl.where(teachers, high, low), tl.where(teachers, low, high)
    to_p, to_q = tl.where(teachers, 0.0, below) - log_mass, tl.where(teachers, below, 0.0) - log_mass
    return p, q, to_p, to_q, rest * tl.where(teachers, ratio, 1.0) / mass, counts


@triton.jit
def _expm1(x):
    """e^x − 1 of x ≤ 0; near 0 by its series, to 5e-7 of itself."""
    series = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))))
    return tl.where(x > -0.25, series, exp(x) - 1.0)


@triton.jit
def _split(log_p, log_q):
    """(the larger of p and q, log of the smaller over it, whether the larger is p's, whether either can be seen)."""
    gap = log_p - log_q
    top = tl.maximum(log_p, log_q)
    counts = top > -_INF
    return top, tl.where(counts, -tl.abs(gap), 0.0), gap > 0, counts


@triton.jit
def powers(log_p, log_q, w, rest):
    """p^w·q^{1−w}, and w·p + (1 − w)·q less it; for w in (0, 1) such that close numbers do not cancel."""
    top, below, teachers, counts = _split(log_p, log_q)
    smaller = tl.where(teachers, rest, w)
    # the smaller may be nothing and its exponent below zero
    power = tl.where(counts, exp(top + smaller * below), 0.0)
    high, drop = exp(top), _expm1(tl.maximum(below, _FAR))
    close = high * (smaller * drop - _expm1(tl.maximum(smaller * below, _FAR)))
    return power, tl.where(counts, tl.where((w > 0) & (rest > 0), close, high + high * smaller * drop - power), 0.0)


@triton.jit
def apart(log_p, log_q):
    """|p − q| and q·sign(q − p)."""
    top, below, teachers, _ = _split(log_p, log_q)
    high = exp(top)
    distance = -high * _expm1(tl.maximum(below, _FAR))
    return distance, tl.where(teachers, distance - high, tl.where(below < 0, high, 0.0))


@triton.jit
def balance(log_p, log_q):
    """(p − q)·log(p/q), and q·r·log(q/p) with r = q/(p + q)."""
    top, below, teachers, _ = _split(log_p, log_q)
    high, drop = exp(top), _expm1(tl.maximum(below, _FAR))
    counts, ratio = high > 0, drop + 1.0
    tilt = tl.where(teachers, tl.where(ratio > 0, ratio * ratio * below, 0.0), -below) * high / (1.0 + ratio)
    return tl.where(counts, high * drop * below, 0.0), tl.where(counts, tilt, 0.0)
