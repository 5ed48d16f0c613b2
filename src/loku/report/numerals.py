"""Numbers as a reader wants to see them."""

from __future__ import annotations

from datetime import UTC, datetime

MINUS = "\N{MINUS SIGN}"
THIN = "\N{THIN SPACE}"


def figure(value: float | None, digits: int = 3) -> str:
    """Format a measured figure: fixed digits where that shows something, else powers of ten; a dash when missing."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}".replace(",", THIN)
    elif size >= 10:
        text = f"{value:.1f}"
    elif value != 0 and size < 0.5 * 10**-digits:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def count(value: float | None) -> str:
    """Format a whole number in groups of three."""
    return "\N{EN DASH}" if value is None else f"{value:,.0f}".replace(",", THIN).replace("-", MINUS)


def moment(text: object) -> str | None:
    """Format an ISO time to the minute, in UTC where it names its zone; other text stays as it is."""
    if not isinstance(text, str):
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when:%Y-%m-%d %H:%M}" if when.tzinfo is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def percent(share: float | None) -> str:
    """Format a share between 0 and 1 in per cent."""
    if share is None:
        return "\N{EN DASH}"
    digits = 0 if share >= 0.1 else 1 if share >= 0.01 or share == 0 else 2
    return f"{100 * share:.{digits}f}{THIN}%"


def duration(seconds: float | None) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{THIN}h {minutes:02d}{THIN}min"


def memory(size: float | None) -> str:
    """Format bytes in binary units."""
    if size is None:
        return "\N{EN DASH}"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f}{THIN}{unit}"
        size /= 1024
    return f"{size:.2f}{THIN}GiB"
