"""One look at tensors says yes only where the checks one by one would; losses take and refuse the same without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdfast import functional as F
from kdfast.functional import _rows, topk
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


def test_all_looks_want_two_tuples() -> None:
    for look in (_rows.agree, _rows.labelled, _rows.listed):
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


def test_lists_are_as_many_indices_and_numbers_a_row() -> None:
    indices, values = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert _rows.listed((BASE, indices, values.to(dtype)), ())
    assert _rows.listed(
        (BASE, torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9)), ()
    )  # more than classes
    assert _rows.listed((ROW, indices[0], values[0]), ())
    assert _rows.listed((BASE[:0], indices[:0], values[:0]), ())
    assert _rows.listed((torch.zeros(2, 5, 6), indices.new_zeros(2, 5, 3), values.new_zeros(2, 5, 3)), ())
    for wrong in (
        None, 3, indices.int(), indices.double(), indices[:3], indices[:, :2], indices[:, :0], indices[0],
        indices[None], indices.to("meta"), indices.as_subclass(Sub), indices.view(torch.uint64),
    ):  # fmt: skip
        assert not _rows.listed((BASE, wrong, values), ()), wrong
    for wrong in (
        None,
        3.0,
        indices,
        values[:3],
        values[:, :2],
        values[0],
        values.to("meta"),
        values.cfloat(),
    ):
        assert not _rows.listed((BASE, indices, wrong), ()), wrong
    for wrong in (BASE[:3], BASE[0], BASE.long(), BASE[None], torch.zeros(()), BASE.as_subclass(Sub), None):
        assert not _rows.listed((wrong, indices, values), ()), wrong
    assert not _rows.listed((BASE, indices[:, :0], values[:, :0]), ())  # k = 0
    assert not _rows.listed((torch.zeros(()), torch.tensor(1), torch.zeros(())), ())
    for given in ((BASE, indices), (BASE, indices, values, values)):
        with pytest.raises(TypeError, match="three tensors are needed"):
            _rows.listed(given, ())
    with pytest.raises(TypeError, match="three tensors are needed"):
        _rows.listed((BASE, indices, values), (1,))


def test_a_torch_without_the_exchange_knows_nothing_at_once() -> None:
    extension = pytest.importorskip("kdfast._C")

    class Old(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    old = BASE.as_subclass(Old)
    agree, labelled, listed = extension.agreement_of(Old, Old)
    assert not agree((old, old), ())
    assert not listed((old, LABELS[:, None], old[:, :1]), ())
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


def test_lists_are_refused_the_same_with_one_look_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    student, indices, values = torch.randn(4, 6), torch.arange(3).expand(4, 3), torch.randn(4, 3)
    wrong: dict[str, tuple[Any, ...]] = {
        "indices: got list": (student, [[0] * 3] * 4, values),
        "indices: got dtype torch.int32": (student, indices.int(), values),
        r"indices: got shape \(3, 3\)": (student, indices[:3], values[:3]),
        r"indices: got shape \(3,\)": (student, indices[0], values[0]),
        "indices: got k = 0": (student, indices[:, :0], values[:, :0]),
        "indices: got class 6": (student, indices + 4, values),
        "logits: got NoneType": (student, indices, None),
        "logits: got dtype torch.int64": (student, indices, values.long()),
        r"logits: got shape \(4, 2\)": (student, indices, values[:, :2]),
        "logits: requires grad": (student, indices, values.clone().requires_grad_()),
        "logits: is on meta": (student, indices, values.to("meta")),
        "student: got dtype": (student.long(), indices, values),
    }
    said = []
    for host in (True, False):  # of a CPU's indices the values are looked at; a GPU's are taken for good
        for listed in (_rows.listed, _rows._unknown):
            monkeypatch.setattr(topk, "listed", listed)
            monkeypatch.setattr(topk, "on_host", lambda tensor, host=host: host)
            texts = []
            for begin, given in wrong.items():
                if host or "class 6" not in begin:
                    with pytest.raises((TypeError, ValueError), match=begin) as caught:
                        F.topk_kd_loss(*given)
                    texts.append(str(caught.value))
            said.append(
                (
                    texts,
                    F.topk_kd_loss(student, indices, values),
                    F.topk_kd_loss(student, indices, values * 2),
                )
            )
    assert said[0][0] == said[1][0]
    assert said[2][0] == said[3][0]
    torch.testing.assert_close([x[1:] for x in said], [said[0][1:]] * 4, rtol=0, atol=0)


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
