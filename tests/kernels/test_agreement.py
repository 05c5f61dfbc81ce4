"""One look at tensors says yes only where the checks one by one would; losses take and refuse the same without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdfast import functional as F
from kdfast.functional import _rows
from kdfast.functional.norm import fused, statistics_loss

pytest.importorskip("kdfast._C")
BASE = torch.zeros(4, 6)
ROW = torch.zeros(6)


class Sub(torch.Tensor):
    """What another library may pass."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_that_fit_together_agree(dtype: torch.dtype) -> None:
    x = BASE.to(dtype)
    others = (
        x.clone(),
        BASE.t().contiguous().t(),
        torch.nn.Parameter(x.clone()),
        x.clone().requires_grad_() * 1,
    )
    for other in others:  # dtypes and strides may differ
        assert _rows.agree((x, other), ())
    assert _rows.agree((x,), ())
    assert _rows.agree((ROW, ROW), ())
    assert _rows.agree((x,), (ROW, None, ROW.to(dtype), torch.nn.Parameter(ROW)))
    assert _rows.agree((x[:0], x[:0]), ())  # no rows
    with torch.inference_mode():
        made = BASE + 1
    assert _rows.agree((BASE, made), ())


def _apart() -> dict[str, Any]:
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([BASE, BASE])
    return {
        "other shape": torch.zeros(4, 7),
        "other dims": torch.zeros(4, 6, 1),
        "0-d": torch.zeros(()),
        "int": BASE.long(),
        "bool": BASE.bool(),
        "complex": BASE.cfloat(),
        "float8": BASE.to(torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8),
        "sparse": BASE.to_sparse(),
        "csr": BASE.to_sparse_csr(),
        "nested": nested,
        "meta": BASE.to("meta"),
        "subclass": BASE.as_subclass(Sub),
        "none": None,
        "number": 1.0,
        "list": [[0.0] * 6] * 4,
    }


@pytest.mark.filterwarnings("ignore:.*[sS]parse", "ignore:.*[qQ]uanti", "ignore:.*deprecat")
def test_what_does_not_fit_does_not_agree() -> None:
    for name, other in _apart().items():
        assert not _rows.agree((BASE, other), ()), name
        assert not _rows.agree((other, BASE), ()), name
        if name not in ("other shape", "other dims", "none"):
            assert not _rows.agree((BASE,), (other,)), name
    assert not _rows.agree((torch.zeros(()), torch.zeros(())), ())
    assert not _rows.agree((BASE,), (torch.zeros(4),))
    assert not _rows.agree((BASE,), (torch.zeros(6, 1),))
    assert not _rows.agree((ROW,), (ROW,))  # has no channels
    assert not _rows.agree((), ())


def test_tensors_of_a_transform_do_not_agree() -> None:
    said: list[bool] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        said.append(_rows.agree((x, x), ()))
        return x * 1

    torch.func.vmap(inside)(BASE.expand(2, 4, 6))
    torch.func.grad(lambda x: inside(x).sum())(BASE)
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(BASE)
    assert said == [False, False]
    F.kd_kl_div(kept[0], BASE)  # a dead wrapper is taken as before


def test_agree_wants_two_tuples() -> None:
    for wrong in (((),), ([], ()), ((), []), ((), (), ())):
        with pytest.raises(TypeError, match="two tuples are needed"):
            _rows.agree(*wrong)  # type: ignore[arg-type]


def test_a_torch_without_the_exchange_knows_nothing_at_once() -> None:
    extension = pytest.importorskip("kdfast._C")

    class Old(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    old = BASE.as_subclass(Old)
    assert not extension.agreement_of(Old, Old)((old, old), ())


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "kd_kl_div": F.kd_kl_div,
    "jsd_loss": F.jsd_loss,
    "divergence_loss": F.divergence_loss,
    "dkd_loss": lambda s, t, **options: F.dkd_loss(s, t, torch.zeros(4, dtype=torch.int64), **options),
}
WRONG: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "teacher": (BASE, torch.zeros(4, 5), {}),
    "student": (BASE.long(), BASE, {}),
    "dim": (BASE, BASE, {"dim": 2}),
    "dim: got bool": (BASE, BASE, {"dim": True}),
    "temperature: got 0.0": (BASE, BASE, {"temperature": 0.0}),
    "temperature: got inf": (BASE, BASE, {"temperature": float("inf")}),
    "temperature: got nan": (BASE, BASE, {"temperature": float("nan")}),
    "temperature: got 1e-20": (BASE, BASE, {"temperature": 1e-20}),
    "temperature: got bool": (BASE, BASE, {"temperature": True}),
    "reduction: got 'average'": (BASE, BASE, {"reduction": "average"}),
    "reduction: got 3": (BASE, BASE, {"reduction": 3}),
    "row_weight": (BASE, BASE, {"row_weight": torch.zeros(5)}),
    "mask": (BASE, BASE, {"mask": torch.zeros(4)}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_and_refuse_the_same_with_one_look_and_without(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, said = LOSSES[loss], []
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    for agree in (_rows.agree, _rows._unknown):
        monkeypatch.setattr(_rows, "agree", agree)
        texts = []
        for begin, (s, t, options) in WRONG.items():
            with pytest.raises((TypeError, ValueError), match=begin) as caught:
                call(s, t, **options)
            texts.append(str(caught.value))
        said.append((texts, *[call(student, teacher, **o) for o in ({}, {"temperature": 3})]))
    assert said[0][0] == said[1][0]
    torch.testing.assert_close(said[0][1:], said[1][1:], rtol=0, atol=0)


def test_norms_refuse_the_same_with_one_look_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = torch.randn(4, 6, 3), torch.ones(6)
    wrong: dict[str, Callable[[], object]] = {
        "running_mean: got NoneType": lambda: F.bn_statistics_loss(x, None, one),  # type: ignore[arg-type]
        "running_var: got shape": lambda: F.bn_statistics_loss(x, one, one[:5]),
        "average_mean: requires grad": lambda: F.bn_statistics_loss(
            x, one, one, average_mean=one.clone().requires_grad_(), average_var=one
        ),
        "sample: got NoneType": lambda: F.bn_ddim_step(None, x, one, one, c1=1.0, c2=1.0),  # type: ignore[arg-type]
        "target: got shape": lambda: F.bn_mse(x, x[:2], one, one),
        "residual: got dtype": lambda: F.bn_relu(x, one, one, residual=x.long()),
    }
    for agree in (_rows.agree, _rows._unknown):
        for module in (fused, statistics_loss):
            monkeypatch.setattr(module, "agree", agree)
        for begin, call in wrong.items():
            with pytest.raises((TypeError, ValueError), match=begin):
                call()
