"""The numbers that a recipe's fields accept, as annotations that pydantic checks."""

from __future__ import annotations

import math
from typing import Annotated

import annotated_types as at

#: The largest that fits any integer of the libraries below, and any float.
_MOST = 2**31 - 1
Positive = Annotated[float, at.Gt(0), at.Lt(math.inf)]
NotNegative = Annotated[float, at.Ge(0), at.Lt(math.inf)]
Count = Annotated[int, at.Ge(1), at.Le(_MOST)]
#: NumPy's generators take 32 bits.
Seed = Annotated[int, at.Ge(0), at.Lt(2**32)]
