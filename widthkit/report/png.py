"""Render a matplotlib figure as the bytes of a PNG file."""

from __future__ import annotations

import io
from typing import Any


def png_bytes(figure: Any) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes, because the file names neither date nor version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": "widthkit"})
    return buffer.getvalue()
