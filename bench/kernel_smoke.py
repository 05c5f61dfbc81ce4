"""One call of each family's kernels, for tools that watch kernels rather than time: sanitizers and profilers.

python bench/kernel_smoke.py --device cuda [--large]
python bench/kernel_smoke.py --device cuda --check --rows results.jsonl    a few calls against float64: is all well?
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdfast.functional import (
    add_noise_embed,
    bn_mse,
    bn_relu,
    denoise_step,
    dkd_loss,
    jsd_loss,
    kd_kl_div,
    noise_mix,
    noise_mse,
    reparam_middle_loss,
)


def losses(device: str, large: bool) -> None:
    """Row, odd-class, class-dimension and two-pass plans, with both gradients."""
    shapes = (
        [(65536, 1000, -1), (4096, 32000, -1)] if large else [(33, 100, -1), (5, 1271, -1), (2, 20000, -1)]
    )
    dtype = torch.bfloat16 if large else torch.float32
    for rows, classes, dim in shapes:
        student, teacher = (
            torch.randn(rows, classes, device=device, dtype=dtype, requires_grad=True) for _ in "st"
        )
        kd_kl_div(student, teacher, 4.0, dim=dim).backward()
        target = torch.randint(classes, (rows,), device=device)
        dkd_loss(student, teacher, target).backward()
        jsd_loss(student, teacher).backward()
    pixels = (4, 19, 128, 256) if large else (2, 19, 7, 9)
    student, teacher = (torch.randn(pixels, device=device, requires_grad=True) for _ in "st")
    kd_kl_div(student, teacher, 4.0, dim=1).backward()


def denoise(device: str, large: bool) -> None:
    """A guided step with noise made in the kernel."""
    shape = (256, 4, 64, 64) if large else (3, 4, 5, 7)
    sample = torch.randn(shape, device=device)
    output = torch.randn((2 * shape[0], 2 * shape[1], *shape[2:]), device=device)
    table = torch.tensor([[1.0, -0.5, 0.9, 0.1, -0.4, 0, 0, 0, 0.1, 1]], device=device)
    denoise_step(sample, output, table, 0, guidance_scale=4.0, seed=1, clip=1.0)


def feature(device: str, large: bool) -> None:
    """The branch recursion, the γ-mix, noising and its error, forward and backward."""
    shape = (128, 256, 8, 8) if large else (3, 4, 7, 7)
    x = torch.randn(shape, device=device, requires_grad=True)
    gamma = torch.rand(shape[0], device=device, requires_grad=True)
    noise_mse(noise_mix(x, gamma, seed=1), seed=1).backward()
    embedding = torch.randn(10, shape[1], device=device, requires_grad=True)
    timesteps = torch.arange(shape[0], device=device) % 10
    table = torch.linspace(0.99, 0.1, 10, device=device)
    add_noise_embed(x.detach(), timesteps, table, embedding, seed=1).sum().backward()
    branches = torch.randn((4, *shape), device=device, requires_grad=True)
    weights, order = torch.rand(2, 4, device=device), torch.arange(4, device=device)
    loss, mean = reparam_middle_loss(branches, x.detach(), *weights, order)
    (loss + mean.square().mean()).backward()


def norm(device: str, large: bool) -> None:
    """Batch norm with ReLU and residual, and with the squared error, in both layouts."""
    shape = (256, 1024, 7, 7) if large else (3, 24, 7, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_()
        weight = torch.ones(shape[1], device=device, requires_grad=True)
        running = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
        y = bn_relu(x, *running, weight, training=True, residual=x.detach())
        bn_mse(y, x.detach(), *running, weight, training=True).backward()


def replay(device: str, large: bool) -> str | None:
    """Insert, draw, re-score; a reason if the C++ extension is not there."""
    from kdfast.errors import MissingExtraError
    from kdfast.replay import PrioritizedReplayBuffer

    capacity, rows = (200_000, 4096) if large else (700, 33)
    try:
        buffer = PrioritizedReplayBuffer(capacity, (3, 32, 32), num_classes=10, device=device)
    except MissingExtraError as error:
        return str(error)
    samples = torch.zeros((rows, 3, 32, 32), dtype=torch.uint8, device=device)
    for _ in range(2):
        buffer.extend(samples, torch.zeros(rows, dtype=torch.int64, device=device))
    batch = buffer.sample(rows // 2)
    buffer.update_priority(batch.index, batch.weight, batch.generation)
    return None


#: A name, a function, and what it is called with.
Call = tuple[str, Callable[..., Any], list[torch.Tensor]]
#: Relative to the norm: float32 arithmetic with fast exponentials, and a bfloat16 gradient's rounding.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def calls(device: str) -> Iterator[Call]:
    """Each loss and the denoising step on three shapes: one program, several, and the long way."""
    for rows, classes, dtype in (
        (128, 100, torch.float32),
        (700, 1000, torch.bfloat16),
        (3, 20000, torch.float32),
    ):
        pair = [3 * torch.randn(rows, classes, device=device) for _ in "st"]
        pair = [logits.to(dtype).requires_grad_() for logits in pair]
        target = torch.randint(classes, (rows,), device=device)
        size = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"
        yield f"kd_kl_div {size}", lambda s, t: kd_kl_div(s, t, 4.0), pair
        yield f"jsd_loss {size}", lambda s, t: jsd_loss(s, t, temperature=2.0), pair
        yield f"dkd_loss {size}", lambda s, t, y: dkd_loss(s, t, y, temperature=4.0), [*pair, target]
    table = torch.tensor([[1.0, -0.5, 0.9, 0.1, -0.4, 0, 0, 0, 0, 1]], device=device)
    for shape in ((3, 4, 5, 7), (64, 4, 32, 32), (256, 4, 64, 64)):
        operands = [torch.randn((size, *shape[1:]), device=device) for size in (shape[0], 2 * shape[0])]
        name = f"denoise_step {'x'.join(map(str, shape))}"
        yield name, lambda x, o: denoise_step(x, o, table.to(x.dtype), 0, guidance_scale=4.0), operands


def error_of(function: Callable[..., Any], operands: list[torch.Tensor]) -> tuple[float, float]:
    """The largest relative error of results and gradients against float64, and what it may be."""

    def both(values: list[torch.Tensor]) -> list[torch.Tensor]:
        result = function(*values)
        leaves = [value for value in values if value.requires_grad]
        return [result.detach(), *(torch.autograd.grad(result, leaves) if leaves else ())]

    exact = [v.detach().double() if v.is_floating_point() else v for v in operands]
    exact = [e.requires_grad_(v.requires_grad) for e, v in zip(exact, operands, strict=True)]
    pairs = zip(both(operands), both(exact), strict=True)
    errors = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    # max() may drop a NaN.
    worst = next((error for error in errors if math.isnan(error)), max(errors))
    return worst, LIMITS[operands[0].dtype]


def check(device: str, rows: Path | None) -> int:
    """Every call against float64, a line and a row each; how many were wrong."""
    from kdfast.benchmarks.journal import Journal

    wrong, known = 0, Journal(rows).records() if rows is not None else []
    right = {row["name"] for row in known if row.get("kind") == "smoke" and row["right"]}
    for name, function, operands in calls(device):
        if name in right:  # before the campaign was killed
            continue
        row: dict[str, Any] = {"kind": "smoke", "part": "smoke", "name": name}
        try:
            found, limit = error_of(function, operands)
            row |= {"error": found, "limit": limit, "right": found < limit}
        except Exception as error:  # the next call may still be right
            row |= {"error": f"{type(error).__name__}: {error}"[:500], "right": False}
        wrong += not row["right"]
        print(f"{'right' if row['right'] else 'WRONG'} {name}: {row['error']}", flush=True)
        if rows is not None:
            Journal(rows).append(row)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--large", action="store_true", help="sizes that fill a GPU")
    parser.add_argument("--check", action="store_true", help="compare with float64 instead")
    parser.add_argument("--rows", type=Path, help="with --check: the campaign's results.jsonl")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.check:
        return int(check(given.device, given.rows) > 0)
    large = given.large and given.device == "cuda"
    for family in (losses, denoise, feature, norm, replay):
        missing = family(given.device, large)
        print(f"{family.__name__}: {missing or 'ran'}")
    if given.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
