"""Numbers as people read them; spaces inside them do not break."""

from __future__ import annotations

SPACE = "\u00a0"
MINUS = "\u2212"
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage.

    >>> percent(0.2264).replace(SPACE, " ")
    '22.6 %'
    """
    return f"{100 * share:.{digits}f}{SPACE}%"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points, with its sign.

    >>> points(-0.5), points(0.0203), points(0.0)
    ('−50.0', '+2.0', '0.0')
    """
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def count(number: float) -> str:
    """Write a count with three digits and a unit, small ones in full.

    >>> count(5717416).replace(SPACE, " "), count(9216), count(120)
    ('5.72 M', '9,216', '120')
    """
    return scaled(number) if number >= 1e5 else f"{number:,.0f}"


def scaled(number: float, unit: str = "") -> str:
    """Write a number with three digits and a decimal prefix.

    >>> scaled(15_912_345, "B").replace(SPACE, " "), scaled(12.0, "B").replace(SPACE, " ")
    ('15.9 MB', '12 B')
    """
    for step, prefix in _STEPS:
        if abs(number) >= step:
            value = number / step
            digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
            return f"{value:.{digits}f}{SPACE}{prefix}{unit}"
    return f"{number:g}{SPACE}{unit}".rstrip(SPACE)


def duration(seconds: float) -> str:
    """Write how long something took.

    >>> [duration(value).replace(SPACE, " ") for value in (0.43, 59.9, 585.8, 7300)]
    ['0.4 s', '60 s', '9 min 46 s', '2 h 1 min']
    """
    if seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    if round(seconds) <= 60:
        return f"{seconds:.0f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60}{SPACE}min"


def p_value(value: float) -> str:
    """Write a p-value with its sign of comparison.

    >>> [p_value(value).replace(SPACE, " ") for value in (1e-12, 0.0312, 1.0)]
    ['p < 0.001', 'p = 0.031', 'p = 1']
    """
    return ("p < 0.001" if value < 0.001 else f"p = {value:.2g}").replace(" ", SPACE)


def times(ratio: float) -> str:
    """Write how many times as fast or as large.

    >>> times(1.2549).replace(SPACE, " ")
    '1.25 ×'
    """
    return f"{ratio:.2f}{SPACE}×"


def plural(number: int, one: str, many: str = "") -> str:
    """Write a count with its noun.

    >>> plural(1, "image"), plural(1200, "image"), plural(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def number(value: float) -> str:
    """Write any number: whole ones in full, others with four digits.

    >>> number(18432), number(0.123456), number(-2.5), number(1e-9)
    ('18,432', '0.1235', '−2.5', '1e−09')
    """
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text.replace("-", MINUS)
