"""SSD-KD: distillation without data, on a few thousand inverted images ("Small Scale Data-Free Knowledge
Distillation", Liu et al. 2024).

The teacher is inverted: a generator, meta-learned from round to round, makes images that the teacher is sure of and the
student is not. φ (Eq. 3) weighs rare classes and hard images more, a replay buffer keeps a few thousand of them, and
each step draws those that the student is most wrong about (Eqs. 4 to 6).
"""

from kdfast.methods.ssdkd.config import SSDKDConfig
from kdfast.methods.ssdkd.generator import Generator
from kdfast.methods.ssdkd.method import SSDKD

__all__ = ["SSDKD", "Generator", "SSDKDConfig"]
