"""What only a GPU can show of the feature and norm families: whole training steps as CUDA graphs, without a sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from kdfast.functional import add_noise_embed, bn_ddim_step, bn_mse, bn_relu, noise_mse
from kdfast.methods.kdiffusion import Kdiffusion, KdiffusionConfig, Stage
from kdfast.models import create_model

pytestmark = pytest.mark.gpu


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a graph, after a run on another stream that compiles what it launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_pieces_of_a_denoising_step_replay_with_new_seeds_and_statistics(
    layout: torch.memory_format,
) -> None:
    shape, seed = (8, 64, 7, 7), torch.tensor([1], device="cuda")
    x = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
    table = torch.linspace(0.99, 0.1, 100, device="cuda")
    timesteps = torch.arange(8, device="cuda") * 10
    embedding = torch.randn(100, 64, device="cuda", requires_grad=True)
    # The cumulative average reads and counts the batches on the device.
    norm = nn.BatchNorm2d(64, momentum=None).cuda()

    def step() -> Sequence[Tensor]:
        held = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True, None, norm.eps)
        count = {"num_batches_tracked": norm.num_batches_tracked}
        noised = add_noise_embed(x, timesteps, table, embedding, seed=seed)
        y = bn_relu(noised, *held, residual=x, **count)
        y = bn_ddim_step(noised, y, *held, c1=1.4, c2=-0.5, **count)
        loss = bn_mse(y, x, *held, **count) + noise_mse(y, seed=seed)
        return loss.detach(), *torch.autograd.grad(loss, (embedding, norm.weight, norm.bias))

    found: list[Sequence[Tensor]] = []
    graph = captured(lambda: found.append(step()))
    for key in (1, 5):
        seed.fill_(key)
        state = {name: value.clone() for name, value in norm.state_dict().items()}
        graph.replay()
        after = {name: value.clone() for name, value in norm.state_dict().items()}
        norm.load_state_dict(state)
        for got, want in zip(found[-1], step(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")


def test_a_whole_step_of_kdiffusion_is_captured() -> None:
    networks = [create_model(name, 10).cuda() for name in ("resnet8", "resnet14")]
    images, labels = torch.randn(16, 3, 16, 16, device="cuda"), torch.randint(10, (16,), device="cuda")
    stage, config = Stage("layer3.0.conv2", "layer3", "layer3.0.bn2"), KdiffusionConfig(branches=4)
    method = Kdiffusion(
        networks[0], networks[1].eval().requires_grad_(False), stages=[stage], images=images, config=config
    )
    parameters = list(method.parameters())
    found: list[Tensor] = []

    def step() -> None:
        loss = method.step((images, labels))
        found[:] = [loss.detach(), *torch.autograd.grad(loss, parameters)]

    graph = captured(step)
    kept = list(found)
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(float(kept[0]))
        assert all(bool(tensor.isfinite().all()) for tensor in kept)
    assert len(set(losses)) > 1  # another permutation each time
