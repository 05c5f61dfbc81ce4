"""One look at tensors says yes only where the checks one by one would; losses take and refuse the same without it."""

from __future__ import annotations

import warnings
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
LABELS = torch.zeros(4, dtype=torch.int64)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that these are a prototype
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


def test_both_looks_want_two_tuples() -> None:
    for look in (_rows.agree, _rows.labelled):
        for wrong in (((),), ([], ()), ((), []), ((), (), ())):
            with pytest.raises(TypeError, match="two tuples are needed"):
                look(*wrong)  # type: ignore[arg-type]
    for pair, axis in (((BASE,), (1,)), ((BASE, LABELS), ()), ((BASE, LABELS), (1, 1))):
        with pytest.raises(TypeError, match="two tensors and a dimension are needed"):
            _rows.labelled(pair, axis)
    with pytest.raises(TypeError, match="int"):
        _rows.labelled((BASE, LABELS), ("1",))


def test_labels_are_one_a_row() -> None:
    cube = torch.zeros(2, 3, 4)
    for dim, shape in enumerate([(3, 4), (2, 4), (2, 3)]):
        labels = torch.zeros(shape, dtype=torch.int64)
        for at in range(-1, 4):
            assert _rows.labelled((cube, labels), (at,)) is (at == dim)
    assert _rows.labelled((BASE, LABELS), (1,))
    assert _rows.labelled((BASE, torch.zeros(8, dtype=torch.int64)[::2]), (1,))
    assert _rows.labelled((torch.zeros(6), torch.tensor(3)), (0,))
    with torch.inference_mode():
        made = LABELS + 1
    assert _rows.labelled((BASE, made), (1,))
    for labels in (
        None, 3, [0] * 4, LABELS.int(), LABELS.double(), LABELS.to("meta"), LABELS.to_sparse(), LABELS[:3],
        LABELS[:, None], LABELS.as_subclass(Sub), LABELS.view(torch.uint64),
    ):  # fmt: skip
        assert not _rows.labelled((BASE, labels), (1,)), labels
    assert not _rows.labelled((BASE.long(), LABELS), (1,))
    assert not _rows.labelled((BASE.as_subclass(Sub), LABELS), (1,))


def test_a_torch_without_the_exchange_knows_nothing_at_once() -> None:
    extension = pytest.importorskip("kdfast._C")

    class Old(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    old = BASE.as_subclass(Old)
    agree, labelled = extension.agreement_of(Old, Old)
    assert not agree((old, old), ())
    assert not labelled((old, LABELS), (1,))


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "kd_kl_div": F.kd_kl_div,
    "jsd_loss": F.jsd_loss,
    "divergence_loss": F.divergence_loss,
    "dkd_loss": lambda s, t, **options: F.dkd_loss(s, t, LABELS, **options),
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


def test_labels_are_refused_the_same_with_one_look_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "on_host", lambda _: False)  # as on a GPU
    x = torch.randn(4, 6)
    wrong: dict[str, Callable[[], object]] = {
        "target: got shape": lambda: F.dkd_loss(x, x, LABELS[:3]),
        "target: got dtype": lambda: F.dkd_loss(x, x, LABELS.int()),
        "target: is on meta": lambda: F.dkd_loss(x, x, LABELS.to("meta")),
        "ignore_index: got float": lambda: F.dkd_loss(x, x, LABELS, ignore_index=1.0),  # type: ignore[arg-type]
        "ignore_index: got bool": lambda: F.dkd_loss(x, x, LABELS, ignore_index=True),
        "ignore_index: got 9223372036854775808": lambda: F.dkd_loss(x, x, LABELS, ignore_index=2**63),
        "mixed_target: got shape": lambda: F.distillation_loss(
            x, x, LABELS, temperature=1.0, ce_weight=1.0, mixed_target=LABELS[:2], lam=0.5
        ),
    }
    for labelled in (_rows.labelled, _rows._unknown):
        monkeypatch.setattr(_rows, "labelled", labelled)
        for begin, call in wrong.items():
            with pytest.raises((TypeError, ValueError), match=begin):
                call()


def test_labels_made_in_inference_mode_are_copied_where_autograd_may_save_them() -> None:
    with torch.inference_mode():
        labels = LABELS + 1
        assert _rows.check_row_labels("target", labels, 1, -100, BASE) is labels
    for on_host in (_rows.on_host, lambda _: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_rows, "on_host", on_host)
            found = _rows.check_row_labels("target", labels, 1, -100, BASE)
            assert found is not None
            assert not found.is_inference()
            assert _rows.check_row_labels("target", LABELS, 1, -100, BASE) is LABELS
            assert _rows.check_row_labels("target", None, 1, -100, BASE) is None
