"""Contenders are what their names say: dtype, attention, whether they skim, and which of the tokens they work on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transkimmer import record_skimming
from transkimmer.bench import contenders, peers, training
from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING
from transkimmer.bench.workload import DTYPES

from .tiny_workload import TORCH_ONLY, batches

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

BY_KEY = {peer.key: peer for peer in peers.PEERS}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("key", TORCH_ONLY)
@torch.no_grad()
def test_a_peer_computes_in_the_dtype_of_its_row(subject: peers.Subject, key: str, dtype: str) -> None:
    inputs = batches()[0].inputs
    assert BY_KEY[key].build(subject, inputs, dtype)(inputs).dtype == DTYPES[dtype]
    models = (subject.dense, subject.skimming)
    assert {p.dtype for m in models for p in m.parameters()} == {torch.float32}, "the subject stays as it is"


@torch.no_grad()
def test_dense_and_skimming_are_two_models(subject: peers.Subject) -> None:
    """If the one built last switched both, dense would be timed skimming."""
    inputs = batches()[0].inputs
    runs = {key: BY_KEY[key].build(subject, inputs, "fp32") for key in ("keep-all", "skimming")}
    for key in ("keep-all", "skimming", "keep-all"):
        with record_skimming() as records:
            runs[key](inputs)
        keeps_all = torch.equal(records[0].keep_masks.all(0), inputs["attention_mask"].bool())
        assert keeps_all == (key == "keep-all")
    assert subject.skimming.skimming.enabled


@torch.no_grad()
def test_only_named_contenders_have_torchs_fused_attention(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in each of three layers, and by sequence where there is no padding."""
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counting(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    inputs = batches()[0].inputs

    def counted(run: Callable[..., torch.Tensor], *more: torch.Tensor) -> int:
        calls.clear()
        run(inputs, *more)
        return len(calls)

    built = {key: BY_KEY[key].build(subject, inputs, "fp32") for key in ("eager", "sdpa", "plain", "keep-all")}
    found = {key: counted(run) for key, run in built.items()}
    assert found == {"eager": 0, "sdpa": 3, "plain": 2 * 3, "keep-all": 0}
    found = {contender.name: counted(contender.run) for contender in contenders.contenders(subject.skimming)}
    assert found == {PADDED: 3, PLAIN: 2 * 3, KEEP_ALL: 0, SKIMMING: 0}
    _, loss = training.LEARNERS[training.DENSE](subject, torch.float32)
    assert counted(loss, training.labels_of(inputs)) == 3


@torch.no_grad()
def test_pytorchs_own_encoder_computes_no_padding(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batches()[0].inputs
    run = BY_KEY["nested"].build(subject, inputs, "fp32")
    unpadded: list[torch.Tensor] = []
    nested = torch._nested_tensor_from_mask
    monkeypatch.setattr(
        torch, "_nested_tensor_from_mask", lambda *rest, **more: unpadded.append(nested(*rest, **more)) or unpadded[-1]
    )
    run(inputs)
    assert [part.size(0) for tensor in unpadded for part in tensor.unbind()] == [9, 4]


def test_contenders_without_padding_may_be_the_baseline() -> None:
    """Works on "real" tokens means that; FLOPs are counted by it as well."""
    assert {peer.key: (peer.works_on, peer.ours) for peer in peers.PEERS} == {
        **dict.fromkeys(("eager", "sdpa", "compile", "onnx", "openvino"), ("padded", False)),
        **dict.fromkeys(("nested", "plain"), ("real", False)),
        **{"keep-all": ("real", True), "skimming": ("kept", True)},
    }
