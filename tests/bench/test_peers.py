"""Peers of other packages: what they are given, how many threads they take, and what is said of one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transkimmer.bench import field, peers, workload

from ..models.tiny import VOCABULARY, padded_inputs
from .tiny_workload import SETTING


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checked(subject: peers.Subject, key: str) -> None:
    """Built as the command does, and equal to the dense model on a batch of another size that has `token_type_ids`."""
    peer = next(peer for peer in peers.PEERS if peer.key == key)
    first = workload.random_batches([9, 4], 2, 1, VOCABULARY)[0]
    with torch.no_grad():
        run = field._build(peer, subject, SETTING, first).run
        inputs = padded_inputs((14, 3, 9))
        expected = subject.dense(**inputs).logits
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        torch.testing.assert_close(run(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_onnx_runtime(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is a peer that need not be there")
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="its export needs them")
    made: list[Any] = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: made.append(session(*a, **k)) or made[-1])
    checked(subject, "onnx")
    (options,) = (each.get_session_options() for each in made)
    assert options.intra_op_num_threads == torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
def test_openvino(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is a peer that need not be there")
    made: list[Any] = []
    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *a, **k: made.append(compile_model(*a, **k)) or made[-1])
    checked(subject, "openvino")
    (compiled,) = made
    assert compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads() == 1


class OwnError(Exception):
    """As packages have them: of no class that Python has besides."""


def entered(subject: peers.Subject, peer: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(field, "PEERS", (peer,))
    ((_, found),) = field.Field().enter(SETTING, subject, workload.random_batches([9, 4], 2, 1, VOCABULARY))
    return found


@pytest.mark.parametrize("when", ["built", "run"])
@pytest.mark.parametrize("error", [OwnError("no\n  such thing"), KeyError("size"), OwnError()])
def test_a_peer_that_fails_has_its_reason(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch, when: str, error: Exception
) -> None:
    def fail(*arguments: object) -> Any:
        raise error

    peer = peers.Peer("unable", "unable", fail if when == "built" else lambda *arguments: fail)
    reasons = {"no\n  such thing": "OwnError: no such thing", "'size'": "KeyError: 'size'", "": "OwnError"}
    assert entered(subject, peer, monkeypatch) == f"failed: {reasons[str(error)]}"
    with pytest.raises(type(error)):
        entered(subject, peers.Peer("unable", "unable", fail, ours=True), monkeypatch)


def test_a_long_reason_keeps_its_start_and_its_end(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Any:
        raise OwnError("Exception from src/infer_request.cpp:189:\n" + "called by\n" * 90 + "Port was not found")

    found = entered(subject, peers.Peer("unable", "unable", fail), monkeypatch)
    assert isinstance(found, str) and len(found) <= 250 and "\n" not in found
    assert found.startswith("failed: OwnError: Exception from src/infer_request.cpp:189: called by")
    assert " ... " in found and found.endswith("called by Port was not found")


def test_a_compiled_model_is_given_only_the_inputs_it_has() -> None:
    """Without ONNX Runtime and OpenVINO, which the tests do not need: both go through this."""
    given: list[dict[str, Any]] = []

    def compute(arrays: dict[str, Any]) -> Any:
        given.append(arrays)
        return arrays["input_ids"]

    run = peers._by_name(iter(["input_ids", "attention_mask"]), compute)
    inputs = {name: torch.ones(1, 2) for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(run(inputs), inputs["input_ids"]) and list(given[0]) == ["input_ids", "attention_mask"]
