"""The picture of coloured texts: the page's colours, wrapping, marks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from transkimmer.bench.picture import DPI, WIDTH, ColouredText, check_matplotlib, draw
from transkimmer.bench.show import colour

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, an extra")
WORDS = [("une", 0), ("cafetière", 2), ("$5", 1), ("and", 0), ("$6", 2)]


def pixels(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]"""
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def count(image: np.ndarray, colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == np.array(rgb)).all(-1).sum())


def test_words_have_the_colours_of_the_page(tmp_path: Path) -> None:
    draw(tmp_path / "none.png", [ColouredText([("word", 1)])], 2)
    draw(tmp_path / "some.png", [ColouredText([("word", 1), ("deep", 2)], "good")], 2)
    none, some = pixels(tmp_path / "none.png"), pixels(tmp_path / "some.png")
    for depth in range(3):
        assert count(none, colour(depth, 2)) > 0  # the legend
    assert count(some, colour(2, 2)) > 2 * count(none, colour(2, 2))
    assert none.shape[1] == WIDTH * DPI


def test_long_passages_wrap_and_nothing_is_lost(tmp_path: Path) -> None:
    heights, blues = [], []
    for number in (5, 100, 200):
        draw(tmp_path / "text.png", [ColouredText([("passage", 1)] * number, "a title")], 3)
        image = pixels(tmp_path / "text.png")
        heights.append(image.shape[0])
        blues.append(count(image, colour(1, 3)))
        assert (image[:, -10:] == 255).all() and (image[-5:] == 255).all()  # nothing runs out of the picture
    assert heights[0] < heights[1] < heights[2]
    legend = blues[0] - 5 * (blues[2] - blues[1]) / 100
    assert blues[1] == pytest.approx(legend + 100 * (blues[2] - blues[1]) / 100, rel=0.02)


def test_marks_and_dollar_signs(tmp_path: Path) -> None:
    files = [tmp_path / "plain.png", tmp_path / "marked.png"]
    draw(files[0], [ColouredText(WORDS), ColouredText(WORDS)], 2)
    draw(files[1], [ColouredText(WORDS, marked={1}), ColouredText(WORDS)], 2)
    plain, marked = map(pixels, files)
    assert plain.shape == marked.shape
    assert count(plain, "#fff3b0") == 0 < count(marked, "#fff3b0")
    rows = (plain != marked).any(-1).any(1).nonzero()[0]
    assert len(rows) < 30 and rows.max() < plain.shape[0] * 0.7  # behind a word of the first text


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="texts: 0 of them"):
        draw(tmp_path / "a.png", [], 2)
    with pytest.raises(ValueError, match="layers=2: a word was read by 3"):
        draw(tmp_path / "a.png", [ColouredText([("a", 3)])], 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--png x: needs matplotlib; run: pip install 'transkimmer\[bench\]'"):
        check_matplotlib("--png x")
