"""The numbers that a recipe's fields accept, as annotations that pydantic checks."""

from __future__ import annotations

from typing import Annotated

import annotated_types as at

Positive = Annotated[float, at.Gt(0)]
NotNegative = Annotated[float, at.Ge(0)]
Count = Annotated[int, at.Ge(1)]
