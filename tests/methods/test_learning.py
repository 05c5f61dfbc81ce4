"""Everything that a method trains reaches the optimizer, and all ranks: told by itself where it does not."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from kdfast import methods
from kdfast.methods.diffkd import DiffKDConfig, fused
from kdfast.methods.kdiffusion import KdiffusionConfig, Stage
from kdfast.training import StepModule
from tests.methods.test_roles import MADE, Net, teacher
from tests.support.ssdkd import SHAPE, TINY

ALL = [name for name in MADE if name != "Distiller"]
LABELS = torch.tensor([0, 1, 2, 3])


def steps(made: Any, optimizer: torch.optim.Optimizer, count: int = 4) -> list[str]:
    """What is warned of in some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.zero_grad()
            made.step((torch.randn(4, 3, 8, 8), LABELS)).backward()
            optimizer.step()
    return [str(w.message) for w in caught]


# --- optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_one_list_of_what_is_to_be_trained_for_every_method(name: str) -> None:
    made = MADE[name](Net(), teacher())
    found = made.parameters_to_train()
    assert {id(p) for p in made.student.parameters()} <= {id(p) for p in found}
    if isinstance(made, nn.Module):
        assert len(found) == len(list(made.parameters()))
    assert made.check_optimizer(torch.optim.SGD(found, 0.1)) == []
    with pytest.warns(UserWarning, match=r"the optimizer lacks \d+ parameters"):
        missing = made.check_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    assert len(missing) == len(found)


@pytest.mark.parametrize("name", ["DMKD", "SSDKD", "SurrogateKD"])
def test_a_method_without_a_student_has_nothing_to_list(name: str) -> None:
    with pytest.raises(ValueError, match="student: got None"):
        MADE[name](None, teacher()).parameters_to_train()


def only_student(made: Any) -> Iterator[nn.Parameter]:
    yield from made.student.parameters()


@pytest.mark.parametrize("name", ["DiffKD", "Kdiffusion", "FitNet"])
def test_an_optimizer_without_the_methods_own_layers_is_noticed_once(name: str) -> None:
    made = MADE[name](Net(), teacher())
    told = [w for w in steps(made, torch.optim.SGD(only_student(made), 0.01)) if "optimizer" in w]
    assert len(told) == 1
    assert "moved the student" in told[0]
    made = MADE[name](Net(), teacher())
    assert not [w for w in steps(made, torch.optim.SGD(made.parameters_to_train(), 0.01)) if "optimizer" in w]


def test_an_optimizer_made_before_the_conversion_is_noticed() -> None:
    student = Net()
    before = torch.optim.SGD(student.parameters(), 0.01)
    made = MADE["Kdiffusion"](student, teacher())
    before.add_param_group({"params": list(made.bridges.parameters())})
    told = [w for w in steps(made, before) if "optimizer" in w]
    assert len(told) == 1
    assert "none of the branches'" in told[0]


# --- several processes -------------------------------------------------------------------------------------------


def test_synchronised_batch_norms_run_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their own forward knows of other ranks; the fused pieces would leave statistics local."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))[0]
    called: list[Tensor] = []
    synced.register_forward_hook(lambda module, inputs, out: called.append(out))
    x, z = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for function in (
        lambda norm: fused.bn(x, norm),
        lambda norm: fused.bn(x, norm, residual=z),
        lambda norm: fused.bn_relu(x, norm),
        lambda norm: fused.bn_step(x, norm, z, 0.7, 0.3),
        lambda norm: fused.bn_mse(x, norm, z),
    ):
        torch.testing.assert_close(function(synced), function(plain))
    assert len(called) == 5
    torch.testing.assert_close(synced.running_var, plain.running_var)


def _diffkd(student: nn.Module) -> Any:
    config = DiffKDConfig(latent_channels=4, distill="feature")
    return methods.DiffKD(student, teacher(), config=config, images=torch.zeros(2, 3, 8, 8))


def _kdiffusion(student: nn.Module) -> Any:
    return methods.Kdiffusion(
        student,
        teacher(),
        stages=[Stage("conv", "norm", "norm")],
        images=torch.zeros(2, 3, 8, 8),
        config=KdiffusionConfig(branches=2),
    )


def _gradients(made: Any, name: str, rank: int) -> Tensor:
    """Of everything that is trained, after a step on this rank's own batch."""
    torch.manual_seed(10 + rank)
    if name == "SSDKD":
        wrapped = DistributedDataParallel(made.student)
        while not made.ready:
            made.synthesize()
        made.step(wrapped).backward()
    else:
        wrapped = DistributedDataParallel(StepModule(made))
        wrapped(torch.randn(4, 3, 8, 8), LABELS).backward()
    return torch.cat([p.grad.flatten() for p in made.parameters_to_train() if p.grad is not None])


def _rank(rank: int, port: int, name: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    student = Net()
    made = {
        "DiffKD": _diffkd,
        "Kdiffusion": _kdiffusion,
        "SSDKD": lambda s: methods.SSDKD(
            s, teacher(), config=methods.SSDKDConfig(**TINY), image_shape=SHAPE, seed=rank
        ),
    }[name](student)
    mine = _gradients(made, name, rank)
    both = [torch.zeros_like(mine) for _ in range(2)]
    distributed.all_gather(both, mine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name != "SSDKD":  # without a wrapper around the method itself
            made.step((torch.randn(4, 3, 8, 8), LABELS)).backward()
    if rank == 0:
        told = [str(w.message) for w in caught if "ranks" in str(w.message)]
        torch.save((*both, len(told)), results)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiffKD", "Kdiffusion", "SSDKD"])
def test_two_ranks_end_with_one_gradient_of_everything_that_is_trained(name: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "gradients.pt")
    multiprocessing.spawn(_rank, (port, name, results), nprocs=2)
    first, second, told = torch.load(results)
    assert first.numel() > 20
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
    assert told == (0 if name == "SSDKD" else 1)
