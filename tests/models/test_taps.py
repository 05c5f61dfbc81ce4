"""Feature taps: they keep the right tensors, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdfast.errors import KDFastError
from kdfast.models import FeatureTaps, create_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.stages = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_and_inputs_are_those_of_the_layers() -> None:
    net, x = Net(), torch.randn(5, 3)
    with FeatureTaps(net, ["stages.1", "stem", "stages.1:input"]) as taps:
        net(x)
        stem = net.stem(x)
        hidden = net.stages[0](stem)
        torch.testing.assert_close(taps["stem"], stem)
        torch.testing.assert_close(taps["stages.1:input"], hidden)
        torch.testing.assert_close(taps["stages.1"], hidden.relu())
        assert [name for name, _ in taps.items()] == list(taps) == ["stages.1", "stem", "stages.1:input"]
        assert len(taps) == 3


def test_gradients_flow_through_a_tap_unless_detached() -> None:
    net, x = Net(), torch.randn(5, 3)
    with FeatureTaps(net, "stem") as taps:
        net(x)
        taps["stem"].square().sum().backward()
    assert net.stem.weight.grad is not None
    with FeatureTaps(net, ["stem"], detach=True) as taps:
        net(x)
        assert not taps["stem"].requires_grad


def test_each_pass_overwrites_the_last_and_a_repeated_layer_keeps_its_last_output() -> None:
    net = nn.Sequential()
    shared = nn.Linear(2, 2)
    net.append(shared)
    net.append(shared)
    with FeatureTaps(net, ["0"]) as taps:
        for x in (torch.randn(1, 2), torch.randn(4, 2)):
            torch.testing.assert_close(net(x), taps["0"])


def test_hooks_are_removed_on_exit_and_on_errors() -> None:
    net = Net()
    taps = FeatureTaps(net, ["stem", "stages:input"])
    assert hooks(net) == 2
    net(torch.randn(1, 3))
    taps.close()
    taps.close()
    assert hooks(net) == 0
    with pytest.raises(KDFastError, match="has not run"):
        taps["stem"]
    with pytest.raises(RuntimeError), FeatureTaps(net, ["stem"]):
        net(torch.randn(1, 99))
    assert hooks(net) == 0
    with pytest.raises(ValueError), FeatureTaps(net, ["stem", "stage"]):
        pass
    assert hooks(net) == 0, "a refused layer must not leave the hooks of the others behind"


def test_clear_forgets_but_keeps_tapping() -> None:
    net = Net()
    with FeatureTaps(net, ["stem"]) as taps:
        net(torch.randn(1, 3))
        taps.clear()
        with pytest.raises(KDFastError, match="'stem' has not run"):
            taps["stem"]
        net(torch.randn(2, 3))
        assert taps["stem"].shape == (2, 4)


def test_unknown_layers_name_the_nearest() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"Net has no layer 'stages.3'; did you mean stages.2"):
        FeatureTaps(net, ["stages.3"])
    with pytest.raises(ValueError, match=r"did you mean stages\.0"):
        FeatureTaps(net, ["stges.0"])
    with pytest.raises(ValueError, match=r"its top layers are stem, stages"):
        FeatureTaps(net, ["qqq"])
    with pytest.raises(ValueError, match="top layers are none"):
        FeatureTaps(nn.ReLU(), ["x"])


def test_a_wrapped_model_is_told_its_prefix() -> None:
    wrapped = nn.Module()
    wrapped.module = Net()
    with pytest.raises(ValueError, match=r"did you mean module\.stem"):
        FeatureTaps(wrapped, ["stem"])


def test_nothing_or_twice_the_same_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        FeatureTaps(Net(), [])
    with pytest.raises(ValueError, match="'stem' more than once"):
        FeatureTaps(Net(), ["stem", "stem"])


def test_a_layer_that_is_not_tapped_is_a_key_error() -> None:
    with FeatureTaps(Net(), ["stem"]) as taps, pytest.raises(KeyError, match="the taps are stem"):
        taps["stages"]


class Structured(nn.Module):
    """Returns what its argument says, as library modules do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: torch.Tensor) -> object:
        return {
            "tuple": (hidden, None),
            "list": [[hidden]],
            "dict": {"last_hidden_state": hidden},
            "none": None,
            "empty": {},
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_structured_outputs_give_their_first_tensor(kind: str) -> None:
    net = nn.Sequential(Structured(kind))
    x = torch.randn(2, 2)
    with FeatureTaps(net, ["0"]) as taps:
        net(x)
        assert torch.equal(taps["0"], x)


@pytest.mark.parametrize("kind", ["none", "empty"])
def test_other_outputs_are_refused(kind: str) -> None:
    net = nn.Sequential(Structured(kind))
    with FeatureTaps(net, ["0"]), pytest.raises(TypeError, match="layer '0' gave a NoneType"):
        net(torch.randn(1))


def test_keyword_inputs_are_tapped() -> None:
    inner = Structured("tuple")
    x = torch.randn(2)
    with FeatureTaps(nn.Sequential(inner), ["0:input"]) as taps:
        inner(hidden=x)
        assert torch.equal(taps["0:input"], x)


def test_a_tap_before_a_relu_sees_negative_values() -> None:
    # In-place activations anywhere in the networks would overwrite it.
    for name, layer in (
        ("resnet8", "bn1"),
        ("wrn_16_1", "bn1"),
        ("vgg8", "block0"),
        ("resnet18", "layer1.0.bn1"),
    ):
        model = create_model(name, 3)
        with FeatureTaps(model, [layer]) as taps:
            model(torch.randn(2, 3, 8, 8))
            assert taps[layer].min() < 0, name
