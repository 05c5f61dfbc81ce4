"""A launch's key: equal where a plan and a compiled kernel are, with the C++ extension and without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdfast.kernels import keys

Key = Callable[[tuple[Any, ...], tuple[Any, ...]], Any]


@pytest.fixture(params=["python", "extension"])
def key(request: pytest.FixtureRequest) -> Key:
    if request.param == "python":
        return keys.python_key
    made: Key = pytest.importorskip("kdfast._C").launch_key_of(torch.Tensor)
    return made


#: Tensors no two of which share a plan or a kernel, None among them.
BASE = torch.zeros(4, 6, 10)
APART = [
    None,
    BASE,
    BASE.bfloat16(),
    BASE.half(),
    BASE.short(),  # as wide as float16
    BASE.view(24, 10),
    BASE.view(4, 60),
    BASE.transpose(0, 1),
    BASE[:, :, 4:],  # begins where 16 bytes do
    BASE[:, :, 1:7],  # does not
    BASE.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    BASE[0, 0, 0],
    BASE.new_empty(0),
    BASE.to("meta"),
    BASE.bfloat16().to("meta"),
]
#: Further arguments that no compiled kernel takes for each other.
KINDS = [
    None, 1.0, 2, 16, 1, 2**40 + 1, 2**40, 2**70 + 1, 2**70, True,
    BASE, BASE.long(), BASE[0, 0, 0], BASE.flatten()[1:],
]  # fmt: skip


def test_what_is_planned_apart_has_keys_apart(key: Key) -> None:
    assert len({key((x,), ()) for x in APART}) == len(APART)
    assert len({key((), (x,)) for x in KINDS}) == len(KINDS)
    assert len({key((BASE, None), ()), key((None, BASE), ()), key((BASE,), (None,)), key((BASE,), ())}) == 4


def test_what_is_planned_alike_has_one_key(key: Key) -> None:
    parameter = torch.nn.Parameter(BASE.clone())
    for other in (BASE.clone(), parameter, BASE.clone().requires_grad_() * 1):
        assert key((BASE,), ()) == key((other,), ())
    # Values of numbers are no part of it, nor is the shape of what only travels with the rows.
    alike = [
        (4.0, 7.5),
        (2, 30),
        (-5, 6),
        (16, 32),
        (2**40 + 1, 2**41 + 3),
        (BASE, BASE.view(-1)),
        (True, False),
    ]
    for one, another in alike:
        assert key((), (one,)) == key((), (another,)), (one, another)
    assert key((), (BASE,)) != key((BASE,), ())


def test_a_key_wants_two_tuples() -> None:
    pytest.importorskip("kdfast._C")
    for wrong in (((),), ([], ()), ((), []), ((), (), ())):
        with pytest.raises(TypeError, match="two tuples are needed"):
            keys.launch_key(*wrong)  # type: ignore[arg-type]


def test_a_torch_without_the_exchange_is_asked_by_name() -> None:
    """The extension knows one version of DLPack's table; with another it asks the tensor itself."""
    extension = pytest.importorskip("kdfast._C")

    class Old(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    key = extension.launch_key_of(Old)
    one, other = (torch.zeros(*size).as_subclass(Old) for size in ((3, 4), (4, 3)))
    assert key((one,), ()) == key((one.clone(),), ())
    assert key((one,), ()) != key((other,), ())
    assert key((), (one,)) == key((), (other,)) != key((), (one.half(),))


def test_what_a_tensor_raises_is_raised() -> None:
    extension = pytest.importorskip("kdfast._C")

    class Nowhere(torch.Tensor):
        __dlpack_c_exchange_api__ = None

        def data_ptr(self) -> int:
            raise NotImplementedError("has no memory")

    nowhere = torch.zeros(3).as_subclass(Nowhere)
    with pytest.raises(NotImplementedError, match="has no memory"):
        extension.launch_key_of(Nowhere)((nowhere,), ())


def test_without_the_extension_keys_are_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kdfast._C", None)
    assert keys._extension() is None
