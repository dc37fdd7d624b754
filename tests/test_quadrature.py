from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitprune import VitpruneError
from vitprune.discovery.quadrature import parse_fixed_quadrature, parse_quadrature


@given(rule=st.sampled_from(["gauss-legendre", "riemann"]), count=st.integers(1, 64))
def test_weights_sum_to_one_and_nodes_stay_inside(rule, count):
    quadrature = parse_quadrature(f"{rule}:{count}")
    assert len(quadrature.nodes) == len(quadrature.weights) == count
    assert sum(quadrature.weights) == pytest.approx(1, abs=1e-12)
    assert all(0 <= node < 1 for node in quadrature.nodes)


@given(count=st.integers(1, 12), data=st.data())
def test_gauss_legendre_integrates_polynomials_exactly(count, data):
    quadrature = parse_quadrature(f"gauss-legendre:{count}")
    degree = data.draw(st.integers(0, 2 * count - 1))
    integral = sum(w * a**degree for a, w in zip(quadrature.nodes, quadrature.weights, strict=True))
    assert integral == pytest.approx(1 / (degree + 1), rel=1e-10)


def test_adaptive_rules_keep_their_nodes_and_add_the_best_ones():
    rules = parse_quadrature("adaptive").rules()
    assert [len(rule.nodes) for rule in rules] == [2, 5, 11, 23]
    for rule, finer in pairwise(rules):
        assert finer.nodes[: len(rule.nodes)] == rule.nodes
    for rule, degree in zip(rules, (3, 7, 17, 35), strict=True):
        assert all(0 < node < 1 for node in rule.nodes)
        assert all(weight > 0 for weight in rule.weights)
        for power in range(degree + 1):
            integral = sum(w * a**power for a, w in zip(rule.nodes, rule.weights, strict=True))
            assert integral == pytest.approx(1 / (power + 1), rel=1e-10)


def test_the_first_addition_is_kronrods():
    """Closed form: Gauss's ±1/√3, and 0 and ±√(6/7) beside them."""
    rule = parse_quadrature("adaptive").finer
    outer = (6 / 7) ** 0.5 / 2
    assert rule.nodes[2:] == pytest.approx([0.5 - outer, 0.5, 0.5 + outer])
    assert rule.weights == pytest.approx([27 / 110, 27 / 110, 49 / 495, 14 / 45, 49 / 495])


def test_adaptive_is_for_choices():
    with pytest.raises(VitpruneError, match="settles which neurons"):
        parse_fixed_quadrature("adaptive")


def test_riemann_is_the_papers_left_sum():
    assert parse_quadrature("riemann:20").nodes == pytest.approx([step * 0.05 for step in range(20)])


@pytest.mark.parametrize("name", ["simpson:4", "riemann", "riemann:0", "gauss-legendre:-1", "riemann:x", ""])
def test_refuses_what_it_cannot_read(name):
    with pytest.raises(VitpruneError, match="quadrature must be"):
        parse_quadrature(name)
