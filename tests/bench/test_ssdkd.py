"""The eager versions that SSD-KD is timed against run its algorithm: the same losses on the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdfast.benchmarks import Settings
from kdfast.benchmarks._ssdkd_eager import EagerSSDKD, FilesSSDKD, MemorySSDKD
from kdfast.benchmarks.ssdkd import MEAN, STD, Inputs, Size, cases
from kdfast.methods.ssdkd import SSDKD
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
INPUTS = Inputs(Size("small", 8, 32, 8, 2, 4, 8), "cpu")


def make(kind: type[EagerSSDKD]) -> EagerSSDKD:
    teacher, student = INPUTS.networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options: dict[str, Any] = {"teacher": teacher, "student": student, "optimizer": optimizer}
    return kind(
        **options,
        config=INPUTS.config,
        images=INPUTS.rows(),
        mean=MEAN,
        std=STD,
        batch_size=INPUTS.size.batch,
    )


@pytest.fixture(params=[FilesSSDKD, MemorySSDKD], ids=["files", "memory"])
def eager(request: pytest.FixtureRequest) -> EagerSSDKD:
    if request.param is FilesSSDKD:
        pytest.importorskip("PIL")
    return make(request.param)


def test_the_losses_are_kdfast_s(eager: EagerSSDKD, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = INPUTS.networks()
    method = SSDKD(teacher, student, INPUTS.config, image_shape=(3, 8, 8), mean=MEAN, std=STD, batch_size=8)
    views = torch.randn(8, 3, 8, 8)
    targets = torch.arange(8) % 10
    inversion = method.inversion
    monkeypatch.setattr(inversion, "views", lambda images: images)
    inversion._targets.copy_(targets)
    inversion._counts.copy_(torch.bincount(eager.predicted, minlength=10))
    student.eval()
    eager.student.eval()
    inversion._watch(True)
    want, _ = inversion._loss(views, student, True)
    inversion._watch(False)
    torch.testing.assert_close(eager.inversion_loss(views, targets), want, rtol=1e-4, atol=1e-4)
    learned, taught = torch.randn(2, 8, 10).unbind()
    # T² = 400 times a small difference of float32 logarithms: 2e-5 apart at some seeds.
    torch.testing.assert_close(eager.loss(learned, taught), method(learned, taught), rtol=1e-4, atol=2e-4)


def test_an_epoch_fills_the_buffer_and_moves_the_student(eager: EagerSSDKD) -> None:
    before = [p.clone() for p in eager.student.parameters()]
    generator = [p.clone() for p in eager.generator.parameters()]
    delta = eager.delta.clone()
    images = eager.synthesize()
    assert images.shape == (8, 3, 8, 8)
    assert not torch.equal(eager.delta[:8], delta[:8])
    assert torch.equal(eager.delta[8:], delta[8:])
    assert any(not torch.equal(a, b) for a, b in zip(generator, eager.generator.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, eager.student.parameters(), strict=True))
    stored = eager.delta.clone()
    assert eager.distil() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, eager.student.parameters(), strict=True))
    assert not torch.equal(eager.delta, stored)
    kept = next(iter(eager.batches()))
    if isinstance(eager, MemorySSDKD):
        assert torch.equal(eager.rows[:8], images)
    else:
        rows = eager.rows_of(range(8))
        assert torch.equal(rows, images)
    assert kept[0].dtype == torch.uint8


def test_crops_show_pieces_of_the_image_or_its_mirror(eager: EagerSSDKD) -> None:
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).expand(16, 1, 8, 8)
    eager.shape = (1, 8, 8)
    crops = eager.crop(images)
    steps = crops[:, :, :, 1:] - crops[:, :, :, :-1]
    inside = (crops[:, :, :, 1:] > 0) & (crops[:, :, :, :-1] > 0)
    directions = {float(steps[b][inside[b]].unique().item()) for b in range(16) if inside[b].any()}
    assert directions == {1.0, -1.0}


def test_the_suite_has_an_epoch_and_its_phases() -> None:
    found = list(cases(Settings("cpu", tiny=True)))
    assert [case.name for case in found] == ["epoch", "inversion round", "distillation steps"]
    assert {p.name for case in found for p in case.providers} == {"eager, files", "eager, memory", "kdfast"}
