"""Writes `python/transkimmer/bench/lengths.json`: token counts of real texts, which the benchmarks take as lengths.

    python benchmarks/make_lengths.py --data DIR --tokenizer FOLDER

DIR holds the official GLUE files (MRPC/dev.tsv, SST-2/dev.tsv, RTE/dev.tsv), IMDB/test.tsv.xz (id, label, stars, text)
and SQuAD/squad-v2.0-dev.json.xz. Only counts are stored, special tokens included, cut at 512, of SQuAD's question and
passage at the usual 384; of IMDB every 50th review, of SQuAD every 20th question.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from pathlib import Path

from transformers import AutoTokenizer

MAX_LENGTH, SQUAD_LENGTH = 512, 384
TARGET = Path(__file__).parents[1] / "python/transkimmer/bench/lengths.json"


def read_rows(path: Path) -> list[list[str]]:
    unpack = lzma.open if path.suffix == ".xz" else open
    with unpack(path, "rt", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def read_squad(path: Path) -> tuple[list[str], list[str]]:
    """(questions, passages)."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    pairs = [(qa["question"], p["context"]) for article in articles for p in article["paragraphs"] for qa in p["qas"]]
    questions, passages = zip(*pairs[::20], strict=True)
    return list(questions), list(passages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)

    def count(*columns: list[str], longest: int = MAX_LENGTH) -> list[int]:
        return [len(ids) for ids in tokenizer(*columns, truncation=True, max_length=longest)["input_ids"]]

    mrpc = read_rows(arguments.data / "MRPC/dev.tsv")
    sst2 = read_rows(arguments.data / "SST-2/dev.tsv")
    rte = read_rows(arguments.data / "RTE/dev.tsv")
    imdb = read_rows(arguments.data / "IMDB/test.tsv.xz")[::50]
    lengths = {
        "mrpc": count([row[3] for row in mrpc], [row[4] for row in mrpc]),
        "sst2": count([row[0] for row in sst2]),
        "rte": count([row[1] for row in rte], [row[2] for row in rte]),
        "imdb": count([row[3] for row in imdb]),
        "squad2": count(*read_squad(arguments.data / "SQuAD/squad-v2.0-dev.json.xz"), longest=SQUAD_LENGTH),
    }
    TARGET.write_text(json.dumps(lengths) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
