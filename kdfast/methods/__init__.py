"""The methods, one module each; none knows of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.lazy import attributes

if TYPE_CHECKING:
    from kdfast.methods.baselines import (
        AT,
        DIST,
        DKD,
        KD,
        RKD,
        ATConfig,
        DISTConfig,
        DKDConfig,
        FitNet,
        FitNetConfig,
        KDConfig,
        RKDConfig,
    )
    from kdfast.methods.diffkd import DiffKD, DiffKDConfig
    from kdfast.methods.dmkd import DMKD, DMKDConfig
    from kdfast.methods.kdiffusion import Kdiffusion, KdiffusionConfig
    from kdfast.methods.ssdkd import SSDKD, SSDKDConfig
    from kdfast.methods.surrogate import SurrogateKD, SurrogateKDConfig

_BASELINES = ("AT", "DIST", "DKD", "FitNet", "KD", "RKD")
_HOME = {
    **{name: "baselines" for name in _BASELINES},
    **{f"{name}Config": "baselines" for name in _BASELINES},
    "DiffKD": "diffkd",
    "DiffKDConfig": "diffkd",
    "DMKD": "dmkd",
    "DMKDConfig": "dmkd",
    "Kdiffusion": "kdiffusion",
    "KdiffusionConfig": "kdiffusion",
    "SSDKD": "ssdkd",
    "SSDKDConfig": "ssdkd",
    "SurrogateKD": "surrogate",
    "SurrogateKDConfig": "surrogate",
}

__all__ = [
    "AT",
    "DIST",
    "DKD",
    "DMKD",
    "KD",
    "RKD",
    "SSDKD",
    "ATConfig",
    "DISTConfig",
    "DKDConfig",
    "DMKDConfig",
    "DiffKD",
    "DiffKDConfig",
    "FitNet",
    "FitNetConfig",
    "KDConfig",
    "Kdiffusion",
    "KdiffusionConfig",
    "RKDConfig",
    "SSDKDConfig",
    "SurrogateKD",
    "SurrogateKDConfig",
]


__getattr__ = attributes(__name__, _HOME)
