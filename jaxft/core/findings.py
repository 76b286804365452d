"""The record of one tested prediction."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

Status = Literal["holds", "violated", "inconclusive"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was predicted, what was measured, and what the rule of the claim's kind says of the two."""

    claim: str
    """Identifier of the claim."""
    predicted: float
    measured: float
    stderr: float
    """Standard error of the measurement, in its units; 0 for exact arithmetic."""
    tolerance: float
    status: Status
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was run: sizes, preconditions as measured, and why a status is inconclusive."""
    seed: int = 0
    """First seed; ``setting["seeds"]`` counts them."""
    precision: str = "float64, matmul highest"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; non-finite numbers become ``None``, which JSON can hold."""
        return {k: _jsonable(v) for k, v in dataclasses.asdict(self).items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    return value
