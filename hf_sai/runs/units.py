"""Numbers for readers."""

from __future__ import annotations

__all__ = ["human_bytes"]


def human_bytes(value: float) -> str:
    """Bytes in powers of 1000.

    Example:
        >>> human_bytes(4_310_000)
        '4.31 MB'
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
