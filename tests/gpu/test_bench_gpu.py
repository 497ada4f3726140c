"""The benchmarks on a GPU: graphs replay what they captured, every kernel that takes part is right, peers that are
installed are measured."""

from __future__ import annotations

import pytest
import torch

from bitwright.bench import experts, kernels, peers, timing
from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, cuda_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCHEMES = ("w4a16-g128", "w4a16-g64-asym", "w3a16-g128", "w2a16-g64", "w8a16-g128")


def test_a_graph_replays_every_call() -> None:
    counters = [torch.zeros(1, device="cuda") for _ in range(3)]
    made = timing.ready([lambda c=c: c.add_(1) for c in counters], "cuda")
    for c in counters:
        c.zero_()
    made.run()
    made.run()
    torch.cuda.synchronize()
    assert [float(c) for c in counters] == [2, 2, 2]


def test_a_capture_that_fails_leaves_torch_as_it_was() -> None:
    before, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")

    def waits() -> None:
        x.mul_(2)
        if torch.cuda.is_current_stream_capturing():
            float(x.sum())  # copied to the host, which cannot be captured

    with pytest.raises(RuntimeError):
        timing.ready([waits], "cuda")
    assert torch.cuda.current_stream() == before
    assert torch.rand(3, device="cuda").isfinite().all()  # a generator that still records would refuse
    made = timing.ready([lambda: x.add_(1)], "cuda")
    made.run()
    torch.cuda.synchronize()
    assert made.outputs[0] is x and made.outputs[1] is x


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_that_takes_the_problem_is_right(scheme: str) -> None:
    options = kernels.Options(
        shapes=((512, 1024),),
        tokens=(1, 16, 100),
        schemes=(scheme,),
        peers=(peers.DENSE,),
        repeats=2,
        rotated_bytes=5_000_000,
    )
    found = kernels.run(options)
    bad = [(r["name"], r["tokens"], r["reason"]) for r in found if r["status"] in ("wrong", "failed")]
    assert not bad
    timed = {r["name"] for r in found if r["status"] == "ok" and r["kind"] == "ours"}
    expected = {"triton", peers.DEQUANTIZED} | ({"gluon"} if {HOPPER, GLUON} <= cuda_features() else set())
    expected |= {"hopper"} if {HOPPER, GLUON, NVRTC} <= cuda_features() else set()
    assert expected <= timed
    assert all(r["roofline_share"] < 1.2 for r in found if r["status"] == "ok")


@pytest.mark.parametrize("peer", [peers.TINYGEMM, peers.HUMMING, peers.GEMLITE])
def test_peers_that_are_installed_are_measured(peer: str) -> None:
    options = kernels.Options(
        shapes=((1024, 1024),), tokens=(1, 16), peers=(peers.DENSE, peer), repeats=2, rotated_bytes=5_000_000
    )
    found = [r for r in kernels.run(options) if r["name"] == peer]
    if all("not installed" in (r["reason"] or "") for r in found):
        pytest.skip(found[0]["reason"])
    assert [(r["status"], r["reason"]) for r in found] == [("ok", None)] * 2


def test_experts_in_one_launch() -> None:
    options = kernels.Options(shapes=((512, 256),), tokens=(1, 33), repeats=2, rotated_bytes=5_000_000)
    found = experts.run(options, experts=8, top_k=2)
    ours = [r for r in found if r["kind"] == "ours"]
    assert ours and [(r["status"], r["reason"]) for r in ours] == [("ok", None)] * len(ours)
    assert all(r["status"] == "ok" for r in found if r["name"] == experts.LOOP)
