"""The paper's figures recomputed, and ours beside them."""

from __future__ import annotations

import pytest

from benchmarks import paper_tables
from benchmarks.accuracy import results as accuracy_results

from .test_accuracy_report import ROWS, row

MACS_OF_128_TOKENS = 931_135_488  # of a layer of BERT-base; TR-BERT's published list of costs has the same


def cells(text: str, task: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {task} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def results(*rows: dict[str, object]) -> list[accuracy_results.Row]:
    """As they are read from a file."""
    found = []
    for line in rows:
        parsed = {}
        for name, (parse, _, _) in accuracy_results._COLUMNS.items():
            text = str(line.get(name, ""))
            parsed[name] = parse(text) if text else None
        found.append(parsed)
    return found


def test_costs() -> None:
    assert paper_tables.layer_macs(128) == MACS_OF_128_TOKENS
    assert paper_tables.tokens_of(MACS_OF_128_TOKENS) == pytest.approx(128)
    assert paper_tables.predictor_share(256) == pytest.approx(0.0792, abs=5e-5)
    assert "| 7.9% | 6.52% |" in paper_tables.blocks([])["averages"]


@pytest.mark.parametrize(
    ("task", "recomputed", "ratio", "implied"),
    [
        ("CoLA", "10.30", "1.84", "12.1"),
        ("RTE", "11.87", "0.39", "78.9"),
        ("SST-2", "4.08", "2.67", "19.0"),
        ("STS-B", "7.17", "2.54", "24.8"),
        ("MRPC", "7.68", "0.97", None),
        ("WNLI", "19.61", "0.92", None),
    ],
)
def test_padded_speedups(task: str, recomputed: str, ratio: str, implied: str | None) -> None:
    found = cells(paper_tables.blocks([])["padding"], task)
    assert found[5:7] == [recomputed, f"**{ratio}**"]
    assert implied is None or found[7] == implied


def test_averages() -> None:
    text = paper_tables.blocks([])["averages"]
    assert "| speedup on GLUE, no padding | 2.81 | 2.83 | 2.64 | 2.49 |" in text
    assert "| speedup on GLUE, padded | 10.97 | 11.40 | 10.11 | 10.56 |" in text
    assert "RoBERTa's rows average 3.24." in text
    assert "claimed 1%: MNLI (1.7), STS-B (1.2), SQuAD v2.0 (1.4)." in text


def test_ours_stand_beside_the_papers() -> None:
    distil = row(backbone="distilbert-base-uncased", task="cola", metric="matthews")
    pruned = row(pruned=True, value=0.99)
    blocks = paper_tables.blocks(results(*ROWS, distil, pruned))
    ours = ["MiniLM, accuracy", "63.00 ± 1.41", "62.00 ± 2.83", "2.04 ± 0.03", "53.00 (λ 0.8)", "1.20"]
    assert cells(blocks["glue"], "RTE") == ["RTE", "65.7", "68.9", "2.85", "4.67", *ours]
    assert cells(blocks["glue"], "MRPC")[5:] == ["MiniLM, f1", "82.00", "80.00", "2.50", "not run", "–"]
    assert cells(blocks["glue"], "CoLA")[5] == "not run"
    alone = paper_tables.blocks(results(pruned))["glue"]
    assert cells(alone, "RTE")[7:9] == ["99.00", "2.02"]
    first = blocks["backbones"].split("\n\n")[0]
    paper = ["CoLA", "55.7", "55.1", "3.52 (1.78)"]
    assert cells(first, "CoLA")[:6] == [*paper, "distilbert-base-uncased, matthews", "62.00"]
    assert cells(blocks["long"], "20News")[4] == "not run"
