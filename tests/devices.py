"""Where the tests train: on the CPU, or with ``TEST_DEVICE=cuda`` on a GPU (``make test-gpu``).

Sums on a GPU come out the same each time only if torch is told so; then tests that compare bit by bit hold there too.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"

if not ON_CPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, to compare with what was never elsewhere."""
    return {name: value.detach().cpu() for name, value in tensors.items()}
