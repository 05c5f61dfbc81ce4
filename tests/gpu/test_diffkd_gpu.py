"""DiffKD's whole training step as a CUDA graph, in mixed precision too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from kdfast.methods.diffkd import DiffKD, DiffKDConfig
from tests.support.diffkd import batch, networks

pytestmark = pytest.mark.gpu


def made(**config: object) -> DiffKD:
    student, teacher = (network.cuda() for network in networks())
    torch.manual_seed(3)
    fields = {"latent_channels": 8, **config}
    return DiffKD(student, teacher.eval(), config=DiffKDConfig(**fields), images=batch()[0].cuda())  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_replayed_step_is_the_eager_one(checkpoint: bool) -> None:
    """Without the adapter and the diffusion loss nothing is random: replay and eager are equal."""
    config = {"adapter": False, "diffusion_weight": 0.0, "checkpoint": checkpoint}
    captured, plain = made(**config), made(**config)
    images, labels = (tensor.cuda() for tensor in batch(8))
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (captured, plain)]

    def step(method: DiffKD, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        logits = method.student(images)
        with torch.no_grad():
            method.teacher(images)
        loss = F.cross_entropy(logits, labels) + method.loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured, optimizers[0])
            step(plain, optimizers[1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers[0])
    for _ in range(3):
        graph.replay()
        expected = step(plain, optimizers[1])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(captured.state_dict().values(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_replay_draws_anew_and_stays_finite(dtype: torch.dtype) -> None:
    method = made()
    images, labels = (tensor.cuda() for tensor in batch(8))
    optimizer = torch.optim.SGD(method.parameters(), 1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype):
            loss = method.step((images, labels))
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    before = copy.deepcopy(method.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(3):
        method.load_state_dict(before)
        graph.replay()
        losses.append(float(loss))
    assert len(set(losses)) == 3
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_no_step_waits_for_the_device() -> None:
    method = made()
    images, labels = (tensor.cuda() for tensor in batch(8))
    method.step((images, labels)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step((images, labels)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
