"""Rows that are stored: which take the place of which, in what file, and of which commit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transkimmer.bench import results


def row(contender: str, kind: str = "model", **values: object) -> dict[str, object]:
    return {"kind": kind, "workload": {"batch_size": 1}, "contender": contender, "note": None} | values


def test_figures_stay_where_a_contender_is_left_out_later() -> None:
    before = [row("a", median_s=1.0), row("b", note="not installed"), row("c", median_s=3.0)]
    absent = row("a", note="left out: --without a")
    assert results.merge(before, [absent, row("b", median_s=2.0), row("c", median_s=4.0)]) == [
        before[0],
        row("b", median_s=2.0),
        row("c", median_s=4.0),
    ]
    assert results.merge([row("a", note="not installed")], [absent]) == [absent]


def test_a_training_step_and_a_forward_do_not_replace_each_other() -> None:
    model, training = row("dense", median_s=1.0), row("dense", "training", median_s=2.0)
    assert results.merge([model], [training]) == [model, training]
    again = row("dense", median_s=3.0)
    assert results.merge([model, training], [again]) == [training, again]


@pytest.mark.usefixtures("one_day")
def test_rows_of_another_number_of_threads_go_into_one_file(tmp_path: Path) -> None:
    """Their workloads say how many."""
    store = results.Store("cpu", folder=tmp_path)
    store.add([row("a", median_s=1.0)])
    (path,) = store.paths
    document = json.loads(path.read_text(encoding="utf-8"))
    document["environment"]["threads"] += 1
    path.write_text(json.dumps(document), encoding="utf-8")
    results.Store("cpu", folder=tmp_path).add([row("b", median_s=1.0)])
    assert [kept["contender"] for kept in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["a", "b"]


@pytest.mark.usefixtures("one_day")
def test_one_file_is_not_written_twice(tmp_path: Path) -> None:
    (path,) = results.Store("cpu", folder=tmp_path).paths
    with pytest.raises(ValueError, match="must be another file than that of --results"):
        results.Store("cpu", file=path, folder=tmp_path)


@pytest.mark.parametrize(("generation", "name"), [("Zen 5", "cpu-avx512-zen-5"), (None, "cpu-avx512")])
def test_generations_of_processors_have_folders_of_their_own(
    generation: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(results, "generation", lambda: generation)
    assert results.device_name("cpu") == name


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_commit_that_is_not_what_was_run_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        run = subprocess.run(["git", *own, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    file = tmp_path / "results.py"
    monkeypatch.delenv("GPU_CHECK_COMMIT", raising=False)
    monkeypatch.setattr(results, "__file__", str(file))
    file.write_text("x = 1\n", encoding="utf-8")
    git("init", "-q")
    assert results.commit() == "unknown", "a file of no commit"
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (tmp_path / "untracked").write_text("", encoding="utf-8")
    head = git("rev-parse", "--short=10", "HEAD")
    assert results.commit() == head
    file.write_text("x = 2\n", encoding="utf-8")
    assert results.commit() == f"{head}-changed"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--results .*file/results: cannot be made \(Not a directory\)"):
        results.Store("cpu", folder=tmp_path / "file/results")
