"""Settings of every test: no network, caches in a folder of their own, shapes checked, seeds fixed."""

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path

# The Hugging Face libraries read these when they are imported, so they are set before any of them is.
_cache = tempfile.mkdtemp(prefix="hf-diffusionblocks-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
for _name in [n for n in os.environ if n.startswith("HF_") and n.endswith(("_CACHE", "_HOME"))]:
    del os.environ[_name]  # each would override HF_HOME for its own library
os.environ.update(
    HF_HOME=_cache,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

if _count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_count))))

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402

# Shape annotations of the maths are enforced while the tests run. Only there: the checks break torch.compile.
jaxtyping.install_import_hook(
    [
        f"hf_diffusionblocks.{module}"
        for module in (
            *("noise", "partition", "preconditioning", "objectives", "sampling", "conditioning", "likelihood"),
            *("baselines.noprop", "baselines.noprop_schedules", "baselines.blocked_cnn", "baselines.forward_forward"),
        )
    ],
    "beartype.beartype",
)

# No deadline: the first example of a test pays for imports and warm-up. CI draws the same examples each time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tests")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> int:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the repository (``cifar10/``, ``text/``), for tests on real data."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is missing")
    return path
