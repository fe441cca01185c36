"""What holds of `distil` before anything is trained: the merge that it starts from."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, list[dict[str, Any]]] = {"distil": [{}, {"start": "task_arithmetic"}]}
IDENTITY_AT: dict[str, dict[str, Any]] = {"distil": {"start": "task_arithmetic", "start_scale": 1.0}}
