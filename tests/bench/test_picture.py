"""The picture of coloured texts: the page's colours, wrapping, marks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from transkimmer.bench.picture import DPI, WIDTH, ColouredText, check_matplotlib, draw
from transkimmer.bench.show import Word, colour

pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, an extra")
WORDS = [Word("une", 0), Word("cafetière", 2), Word("$5", 1), Word("and", 0), Word("$6", 2)]


def pixels(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]"""
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def count(image: np.ndarray, colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == np.array(rgb)).all(-1).sum())


def test_words_have_the_colours_of_the_page(tmp_path: Path) -> None:
    draw(tmp_path / "none.png", [ColouredText([Word("word", 1)])], 2)
    draw(tmp_path / "some.png", [ColouredText([Word("word", 1), Word("deep", 2)], "good")], 2)
    none, some = pixels(tmp_path / "none.png"), pixels(tmp_path / "some.png")
    for depth in range(3):
        assert count(none, colour(depth, 2)) > 0  # the legend
    assert count(some, colour(2, 2)) > 2 * count(none, colour(2, 2))
    assert none.shape[1] == WIDTH * DPI


def test_long_passages_wrap_and_nothing_is_lost(tmp_path: Path) -> None:
    heights, blues = [], []
    for number in (5, 100, 200):
        draw(tmp_path / "text.png", [ColouredText([Word("passage", 1)] * number, "a title")], 3)
        image = pixels(tmp_path / "text.png")
        heights.append(image.shape[0])
        blues.append(count(image, colour(1, 3)))
        assert (image[:, -10:] == 255).all() and (image[-5:] == 255).all()  # nothing runs out of the picture
    assert heights[0] < heights[1] < heights[2]
    legend = blues[0] - 5 * (blues[2] - blues[1]) / 100
    assert blues[1] == pytest.approx(legend + 100 * (blues[2] - blues[1]) / 100, rel=0.02)


def test_texts_begin_in_one_column_whatever_their_titles(tmp_path: Path) -> None:
    lefts = []
    for title in ("good", "predicted comp.os.ms-windows.misc, gold talk.politics.mideast", "x" * 300):
        draw(tmp_path / "text.png", [ColouredText([Word("deep", 2)], title)], 2)
        image = pixels(tmp_path / "text.png")
        line = image[-45:]  # below the title
        lefts.append(int((line == [int(colour(2, 2)[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any(0).argmax()))
    assert len(set(lefts)) == 1 and lefts[0] > 30


def test_signs_stand_at_their_words(tmp_path: Path) -> None:
    ends = []
    for spaced in (False, True):
        draw(tmp_path / "text.png", [ColouredText([Word("deep", 2), Word("!", 1, spaced)])], 4)
        ends.append(int((pixels(tmp_path / "text.png")[-40:] < 200).any((0, 2)).nonzero()[0].max()))
    assert ends[0] < ends[1]


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
        draw(tmp_path / "a.png", [ColouredText([Word("a", 3)])], 2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--png x: needs matplotlib; run: pip install 'transkimmer\[bench\]'"):
        check_matplotlib("--png x")
