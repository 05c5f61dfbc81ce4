"""The networks: denoisers, noise adapters, autoencoder, projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.methods.diffkd.fused import bn, bn_relu

__all__ = ["Autoencoder", "Bottleneck", "FeatureDenoiser", "LogitDenoiser", "NoiseAdapter"]

# Rows of the time embedding: as many as the authors' code has, of which T are used.
_TIMES = 1280


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with batch norms, plus the input; nothing is activated after the sum.

    Args:
        channels: C, in and out.
        reduction: The inner layers have C / reduction channels, at least 1.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        out = bn_relu(self.conv1(x), self.bn1)
        out = bn_relu(self.conv2(out), self.bn2)
        return bn(self.conv3(out), self.bn3, residual=x)


class FeatureDenoiser(nn.Module):
    """ε̂ of a map: the time's embedding added, two bottlenecks, 1×1, batch norm (Sec. 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TIMES, channels)
        self.block1, self.block2 = Bottleneck(channels, 4), Bottleneck(channels, 4)
        self.out = nn.Conv2d(channels, channels, 1)
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """From z with its time's embedding added, ``[B, C, H, W]``, to ε̂ but for :attr:`norm`."""
        out: Tensor = self.out(self.block2(self.block1(x)))
        return out


class LogitDenoiser(nn.Module):
    """ε̂ of a vector: the time's embedding added, two perceptrons of width 4C (App. B.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.embedding = nn.Embedding(_TIMES, channels)
        self.fc1, self.bn1 = nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide)
        self.fc2, self.bn2 = nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)
        self.fc3, self.bn3 = nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide)
        self.out = nn.Conv2d(wide, channels, 1)
        self.norm: nn.BatchNorm2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """From z with its time's embedding added, ``[B, C, 1, 1]``, to ε̂."""
        hidden = bn(self.fc2(bn_relu(self.fc1(x), self.bn1)), self.bn2)
        out: Tensor = self.out(bn_relu(self.fc3(hidden), self.bn3))
        return out


class NoiseAdapter(nn.Module):
    """γ of each sample, from its feature (Sec. 3.3).

    Args:
        channels: C.
        dense: Maps ``[B, C, H, W]``, which a bottleneck looks at, or vectors ``[B, C, 1, 1]``, which a perceptron does.
    """

    def __init__(self, channels: int, *, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        if dense:
            self.block = Bottleneck(channels, 8)
        else:
            self.fc1, self.bn1 = nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels)
            self.fc2, self.bn2 = nn.Conv2d(2 * channels, channels, 1), nn.BatchNorm2d(channels)
        self.out = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to γ ``[B]``, each in (0, 1); at least float32."""
        seen = self.block(x) if self.dense else bn(self.fc2(bn_relu(self.fc1(x), self.bn1)), self.bn2)
        scores: Tensor = self.out(seen.mean((2, 3)))
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return scores.softmax(1, dtype=dtype)[:, 0]


class Autoencoder(nn.Module):
    """The linear autoencoder of teacher features: a 1×1 convolution and batch norm, and a 1×1 back (Sec. 3.2)."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Conv2d(channels, latent, 1), nn.BatchNorm2d(latent)
        self.decoder = nn.Conv2d(latent, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` to the latent ``[B, L, H, W]`` and the reconstruction."""
        latent = bn(self.encoder(x), self.norm)
        return latent, self.decoder(latent)
