"""The page of what happens to models and images as strangers bring them says what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from first_try import KINDS, row

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first_try.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("met", KINDS)
def test_the_page_says_what_happens(met):
    """If not: python tests/first_try.py."""
    assert row(met) in PAGE.read_text().splitlines()


def test_the_page_has_no_other_rows():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(KINDS)
