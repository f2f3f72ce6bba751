"""Memory that kernels allocate inside one operation, out of sight of torch's dispatch."""

from __future__ import annotations

from typing import Any

import torch


def workspace_bytes(func: Any, args: Any, output: Any, device: torch.device) -> int:
    return 0
