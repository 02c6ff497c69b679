"""How a pair of texts is shown."""

from __future__ import annotations

import torch
from transkimmer import SkimConfig, add_skimming
from transkimmer.bench.show import SEPARATOR, word_depths

from ..models.tiny import tiny
from ..models.words import word_tokenizer


@torch.no_grad()
def test_the_texts_of_a_pair_are_set_apart_by_what_the_model_read() -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(schedule=[1.0, 0.5, 0.5])).eval()
    words, _ = word_depths(model, word_tokenizer(), "dog runs", "cat sleeps")
    assert [word.text for word in words] == ["dog", "runs", SEPARATOR, "cat", "sleeps"]
    assert all(word.spaced for word in words)
    depths = [word.depth for word in words]
    assert 1 <= min(depths) < max(depths) == 3
    texts, _ = word_depths(model, word_tokenizer(), "dog runs")
    assert [word.text for word in texts] == ["dog", "runs"]
