from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitprune import VitpruneError
from vitprune.discovery.quadrature import parse_quadrature


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


def test_riemann_is_the_papers_left_sum():
    assert parse_quadrature("riemann:20").nodes == pytest.approx([step * 0.05 for step in range(20)])


@pytest.mark.parametrize("name", ["simpson:4", "riemann", "riemann:0", "gauss-legendre:-1", "riemann:x", ""])
def test_refuses_what_it_cannot_read(name):
    with pytest.raises(VitpruneError, match="quadrature must be"):
        parse_quadrature(name)
