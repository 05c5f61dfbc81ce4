"""Names of places: items of what a layer returns, and calls of a layer that runs again and again."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast.errors import KDFastError
from kdfast.models import FeatureTaps
from kdfast.models.layouts import reading_of
from kdfast.models.maps import as_map
from kdfast.models.places import Place
from tests.support.detection import Detector, batch

IMAGES = batch()[0]
SIZES = [(8, 12), (4, 6), (2, 3)]


class Gives(nn.Module):
    """Returns what it was told."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


def tapped(value: Any, name: str) -> Tensor:
    network = nn.Sequential(Gives(value))
    with FeatureTaps(network, [name]) as taps:
        network(torch.zeros(1))
        return taps[name]


A, B, C = (torch.full((2, 3, size, size), float(size)) for size in (1, 2, 4))


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        ((A, B, C), "0:1", B),
        ([A, B, C], "0:-1", C),
        (OrderedDict(p3=A, p4=B), "0:p4", B),
        ({"0": A, "1": B, "pool": C}, "0:2", C),
        ({"1": A, "0": B}, "0:0", B),  # a key before a position
        ([(A, None), (B, None)], "0:1:0", B),
        ([(A, None), (B, None)], "0:1", B),
        ({"hidden_states": (A, B, C)}, "0:hidden_states:-2", B),
        (SimpleNamespace(hidden_states=(A, B)), "0:hidden_states:0", A),
        (OrderedDict(aux=A, out=B), "0", B),
        ((A, None), "0", A),
        ((A, torch.zeros(2, 5, 5)), "0", A),
    ],
)
def test_an_item_is_named_by_key_or_position(value: Any, name: str, expected: Tensor) -> None:
    assert torch.equal(tapped(value, name), expected)


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ((A, B), "0:2", r"layer '0:2': no item '2'; there are 0, 1$"),
        ({"p3": A}, "0:p4", r"no item 'p4'; there are 'p3'"),
        ((A, B, C), "0", r"layer '0' gave 3 maps; name one, '0:0' to '0:2', or all of them, '0:\*'"),
        ({"p3": A, "p4": B}, "0", r"gave 2 maps; name one, '0:p3' to '0:p4'"),
        (A, "0:1", r"gave a Tensor, which has no item '1'"),
        ((A, B), "0#x", r"got call 'x' after '#', accepted: a number, or \*"),
    ],
)
def test_what_is_not_there_or_not_clear_is_refused(value: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tapped(value, name)


def test_inputs_have_items_too() -> None:
    network = Detector().eval()
    with FeatureTaps(network, ["head:input:1", "neck:1", ":output:0:scores"]) as taps:
        out = network(IMAGES)
        assert torch.equal(taps["head:input:1"], taps["neck:1"])
        assert torch.equal(taps[":output:0:scores"], out[0]["scores"])


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_every_item_and_every_call_is_a_level(form: str) -> None:
    network = Detector(form=form).eval()
    with FeatureTaps(network, ["neck:*", "head.scores#*", "head.scores", "head.act"]) as taps:
        for _ in range(2):  # a pass begins anew
            network(IMAGES)
        for name in ("neck:*", "head.scores#*", "head.scores", "head.act"):
            assert [tuple(x.shape[2:]) for x in taps.levels(name)] == SIZES, name
        with pytest.raises(
            ValueError, match=r"'head.scores' has 3 levels in a pass, of different sizes; name one"
        ):
            taps["head.scores"]


def test_calls_are_counted_from_both_ends() -> None:
    network = Detector().eval()
    with FeatureTaps(network, ["head.scores#0", "head.scores#-1", "head.scores#3"]) as taps:
        network(IMAGES)
        assert tuple(taps["head.scores#0"].shape[2:]) == SIZES[0]
        assert tuple(taps["head.scores#-1"].shape[2:]) == SIZES[-1]
        with pytest.raises(KDFastError, match=r"'head.scores#3' ran 3 times in a pass; there is no call 3"):
            taps["head.scores#3"]


def test_an_activation_without_weights_that_runs_again_is_its_last_output() -> None:
    """The one ReLU of a residual block, as torchvision has it; of a layer with weights every call counts."""
    relu, conv = nn.ReLU(), nn.Conv2d(3, 3, 1)
    network = nn.Sequential(conv, relu, conv, relu)
    x = torch.randn(2, 3, 4, 4)
    with FeatureTaps(network, ["0", "1", "1#0"], every_call=True) as taps:
        out = network(x)
        assert len(taps.levels("0")) == 2
        assert [torch.equal(level, out) for level in taps.levels("1")] == [True]
        assert torch.equal(taps["1"], out)
        assert not torch.equal(taps["1#0"], out)


def test_what_a_checkpoint_computes_again_is_no_call() -> None:
    conv = nn.Conv2d(3, 3, 1)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.conv, x, use_reentrant=False)
            return out

    network = Network()
    with FeatureTaps(network, ["conv"], every_call=True) as taps:
        network.forward(
            torch.randn(1, 3, 2, 2)
        ).square().sum().backward()  # forward: no hook of the network's runs
        assert len(taps.levels("conv")) == 1


def test_a_name_is_taken_apart_once() -> None:
    place = Place.parse("head.scores:input:2:x#-1", ())
    assert (place.layer, place.is_input, place.items, place.call) == ("head.scores", True, ("2", "x"), -1)
    assert Place.parse(":output", ()).is_output
    assert Place.parse("odd:name", {"odd:name"}).layer == "odd:name"


# --- tokens ------------------------------------------------------------------------------------------------------


def test_which_tokens_are_the_maps_can_be_said() -> None:
    grid = torch.arange(2 * 6 * 3, dtype=torch.float32).view(2, 6, 3)
    with_registers = torch.cat((torch.zeros(2, 5, 3), grid), 1)
    images = torch.zeros(2, 3, 32, 48)
    read = reading_of(nn.Identity(), "", with_registers, "auto", images, (5, None))
    assert torch.equal(read(with_registers), grid.view(2, 2, 3, 3).movedim(-1, 1))
    with_detections = torch.cat((torch.zeros(2, 1, 3), grid, torch.zeros(2, 10, 3)), 1)
    read = reading_of(nn.Identity(), "", with_detections, "auto", images, (1, -10))
    assert torch.equal(read(with_detections), grid.view(2, 2, 3, 3).movedim(-1, 1))
    with pytest.raises(ValueError, match=r"form a square, .*student_tokens"):
        as_map(with_registers, "auto", "vit")


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 70), (32, 512)])
@pytest.mark.parametrize("extra", [0, 1])
def test_tokens_of_oblong_pictures_form_their_grid(size: tuple[int, int], extra: int) -> None:
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    tokens = torch.randn(2, rows * columns + extra, 3)
    read = reading_of(nn.Identity(), "", tokens, "auto", torch.zeros(2, 3, *size))
    assert torch.equal(read(tokens), tokens[:, extra:].view(2, rows, columns, 3).movedim(-1, 1))
    with pytest.raises(
        ValueError, match=rf"must form a grid of {rows}×{columns}, as when the method was made"
    ):
        read(torch.randn(2, rows * columns + 7, 3))
