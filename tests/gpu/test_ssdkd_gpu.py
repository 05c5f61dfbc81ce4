"""SSD-KD on CUDA: captured steps are the eager ones, without a wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdfast.methods import SSDKD, SSDKDConfig
from tests.support.ssdkd import MEAN, SHAPE, STD, TINY, trained

pytestmark = pytest.mark.gpu


def make(**values: Any) -> SSDKD:
    teacher, student = (trained(seed).cuda() for seed in (1, 2))
    config = SSDKDConfig(**{**TINY, **values})
    return SSDKD(
        student,
        teacher.eval().requires_grad_(False),
        config=config,
        image_shape=SHAPE,
        mean=MEAN,
        std=STD,
        batch_size=8,
    )


def go(made: SSDKD, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    optimizer = torch.optim.SGD(made.student.parameters(), lr=0.05)
    losses = []
    for _ in range(rounds):
        images = made.synthesize().clone()
        for _ in range(made.steps if made.ready else 0):
            loss = made.step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return images, torch.stack(losses)


@pytest.fixture(autouse=True)
def _same_algorithms() -> Any:
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize(
    "values", [{}, {"generator": "pixels"}, {"generator": "scratch"}, {"meta": "reptile"}]
)
def test_captured_steps_are_the_eager_ones(values: dict[str, Any]) -> None:
    captured, eager = make(**values), make(**values, cuda_graphs=False)
    (images, losses), (wanted_images, wanted) = go(captured, 6), go(eager, 6)
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)
    assert (images.int() - wanted_images.int()).abs().float().mean() < 1
    assert all(step._graph is not None for step in list(captured.inversion._steps.values())[-1:])
    assert all(loss._graph is not None for loss in captured._losses.values())


def test_a_whole_update_is_one_graph() -> None:
    captured, eager = make(), make(cuda_graphs=False)
    losses = []
    for made in (captured, eager):
        rate = torch.tensor(0.05, device="cuda")
        optimizer = torch.optim.SGD(made.student.parameters(), lr=rate, momentum=0.9, fused=True)
        made.synthesize()
        made.synthesize()
        losses.append([])
        for number in range(10):
            optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + number))
            losses[-1].append(made.update(optimizer).clone())
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-4)
    assert next(iter(captured._updates.values()))._graph is not None


def test_replays_draw_anew() -> None:
    made = make()
    go(made, 3)
    assert len({round(float(made.step()), 6) for _ in range(20)}) > 10


def test_nothing_waits_for_the_device() -> None:
    made = make()
    go(made, 5)  # captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.synthesize()
        made.step().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_restored_run_goes_on() -> None:
    made = make()
    go(made, 5)
    state, student = made.state_dict(), {k: v.clone() for k, v in made.student.state_dict().items()}
    _, wanted = go(made, 2)
    other = make()
    other.load_state_dict(state)
    other.student.load_state_dict(student)
    torch.testing.assert_close(go(other, 2)[1], wanted, rtol=1e-3, atol=1e-4)
