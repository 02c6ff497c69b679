"""Coloured texts as a PNG, in the colours of the terminal and the page; drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .show import Word, colour

WIDTH, DPI, SIZE = 10.0, 120, 9.0  # inches, pixels per inch, points
_LINE = 1.6 * SIZE / 72  # inches from line to line
_MARGIN, _INDENT = 0.15, 0.4  # inches; texts stand below their titles
_MARK = "#fff3b0"  # behind marked words


@dataclass(frozen=True)
class ColouredText:
    """title: stands above the words; marked: which words to set off."""

    words: Sequence[Word]
    title: str = ""
    marked: Collection[int] = ()


def check_matplotlib(option: str) -> None:
    """Raises ValueError naming `option` where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{option}: needs matplotlib; run: pip install 'transkimmer[bench]'") from error


def draw(path: Path, texts: Sequence[ColouredText], layers: int) -> None:
    """Writes `texts` below a legend to `path`, words in the colour of the layers that read them, long texts wrapped.

    Args:
        path: of the PNG, whatever its name ends in.
        texts: at least one, of at least one word each.
        layers: of the model; no word is read by more.

    Raises:
        ValueError: an argument is not as above.
        OSError: the file cannot be written.
    """
    if not texts or not all(text.words for text in texts):
        raise ValueError(f"texts: {len(texts)} of them, some perhaps empty: there must be words to draw")
    deepest = max(word.depth for text in texts for word in text.words)
    if deepest > layers:
        raise ValueError(f"layers={layers}: a word was read by {deepest}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.0), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    page = _Page(figure, canvas.get_renderer())
    page.legend(layers)
    for text in texts:
        page.text(text, layers)
    page.finish()
    figure.savefig(path, format="png", metadata={"Software": None})


class _Page:
    """Words from left to right and from the top down; places in inches until the height is known."""

    def __init__(self, figure: Any, renderer: Any) -> None:
        self.figure = figure
        self.renderer = renderer
        self.x, self.y = _MARGIN, _MARGIN
        self.artists: list[tuple[Any, float]] = []  # with the distance of their baselines from the top
        self.space = self._width("a a", bold=False) - self._width("aa", bold=False)

    def legend(self, layers: int) -> None:
        self.word("read by", "black")
        for depth in range(layers + 1):
            self.word(str(depth), colour(depth, layers), bold=depth == layers)
        self.word("layers", "black")
        self._new_line(_MARGIN)

    def text(self, text: ColouredText, layers: int) -> None:
        self.y += 0.4 * _LINE
        start = _INDENT if text.title else _MARGIN
        for part in text.title.split():
            self.word(part, "black")
        if text.title:
            self._new_line(start)
        for place, (word, depth, spaced) in enumerate(text.words):
            if not spaced and self.x > start:
                self.x -= self.space
            self.word(word, colour(depth, layers), bold=depth == layers, mark=place in text.marked, indent=start)
        self._new_line(_MARGIN)

    def word(self, word: str, colour: str, *, bold: bool = False, mark: bool = False, indent: float = _MARGIN) -> None:
        width, room = self._width(word, bold), WIDTH - _MARGIN - indent
        if width > room and len(word) > 1:  # an address, say
            fits = max(1, int(len(word) * room / width))
            for part in (word[:fits], word[fits:]):
                self.word(part, colour, bold=bold, mark=mark, indent=indent)
            return
        if self.x > indent and self.x + width > WIDTH - _MARGIN:
            self._new_line(indent)
        style: dict[str, Any] = {"fontsize": SIZE, "fontweight": "bold" if bold else "normal", "color": colour}
        if mark:
            style["bbox"] = {"facecolor": _MARK, "edgecolor": "none", "pad": 1.0}
        # A dollar sign is one: what stands in a text is no formula.
        artist = self.figure.text(self.x / WIDTH, 0, word, va="baseline", parse_math=False, **style)
        self.artists.append((artist, self.y + 0.8 * _LINE))
        self.x += width + self.space

    def finish(self) -> None:
        """Makes the picture as high as what is on it."""
        height = self.y + _MARGIN
        self.figure.set_size_inches(WIDTH, height)
        for artist, down in self.artists:
            artist.set_y(1 - down / height)

    def _new_line(self, indent: float) -> None:
        self.x, self.y = indent, self.y + _LINE

    def _width(self, word: str, bold: bool) -> float:
        """Inches."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=SIZE, weight="bold" if bold else "normal")
        width, _, _ = self.renderer.get_text_width_height_descent(word, font, ismath=False)
        return width / DPI
