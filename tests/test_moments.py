"""Moments that were taken in parts are those of all rows, however they were parted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitprune.calibration.moments import Moments


def draw(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, dtype=torch.float64, generator=generator) * 3 + torch.arange(5)


def of(rows, weights=None, shift=None):
    moments = Moments(shift)
    moments.add(rows, weights)
    return moments


def test_they_are_the_mean_and_the_covariance_of_the_rows():
    rows = draw(0, 40)
    mean, covariance = of(rows).finish()
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), rtol=1e-12, atol=1e-12)


def test_weights_count_rows_several_times():
    rows = draw(1, 12)
    times = torch.arange(12) % 3
    expected = of(rows.repeat_interleave(times, 0)).finish()
    for got, want in zip(of(rows, times.double().unsqueeze(1)).finish(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_merged_parts_are_the_whole(seed, counts, shared):
    """Around a shift that all parts share, or each around its own."""
    rows = draw(seed, sum(counts))
    parts = [of(part, shift=torch.ones(5).double() if shared else None) for part in rows.split(counts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == len(rows)
    for got, want in zip(merged.finish(), of(rows).finish(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_merging_leaves_both_and_knows_the_empty_one():
    one, other = of(draw(2, 6)), of(draw(3, 4))
    before = one.sum_H.clone(), other.square_HH.clone()
    one.merge(other)
    assert torch.equal(one.sum_H, before[0])
    assert torch.equal(other.square_HH, before[1])
    for merged in (one.merge(Moments()), Moments().merge(one)):
        assert merged.count == 6
        assert torch.equal(merged.finish()[0], of(draw(2, 6)).finish()[0])
