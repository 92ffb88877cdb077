"""How wide text will be, before it is drawn: to shorten it, and to break lines."""

from __future__ import annotations

__all__ = ["Ruler"]


class Ruler:
    """Measures text as matplotlib will draw it with its default font; needs matplotlib.

    Args:
        dpi: dots per inch of the drawing.
    """

    def __init__(self, dpi: int) -> None:
        from matplotlib.backends.backend_agg import RendererAgg

        self.dpi = dpi
        self._renderer = RendererAgg(1, 1, dpi)

    def width(self, text: str, size: float) -> int:
        """Width in pixels of one line; `size` in points."""
        from matplotlib.font_manager import FontProperties

        width, _, _ = self._renderer.get_text_width_height_descent(text, FontProperties(size=size), False)
        return int(width) + 1

    def shorten(self, text: str, width: int, size: float) -> str:
        """As much of a text as fits into a width, on one line."""
        text = " ".join(text.split())
        if self.width(text, size) <= width:
            return text
        while text and self.width(text + "…", size) > width:
            text = text[:-1]
        return text.rstrip() + "…"

    def wrap(self, text: str, width: int, size: float) -> list[str]:
        """Lines that fit into a width, broken between words; a word that is wider stands alone."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines
