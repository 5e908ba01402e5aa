"""How long importing takes, in processor time (user and system) of a fresh process: the best of five.

``python benchmarks/import_time.py``. What the package costs beyond torch and transformers is the difference of "all
public names" and "torch, transformers", whose own modules are then imported already.
"""

import os
import subprocess
import sys

# The parts of torch and transformers that the public names use, without anything of ours.
_LIBRARIES = "import torch, transformers; from transformers import AutoModel, PreTrainedModel, GenerationMixin, Trainer"
CASES = {
    "python alone": ["-c", "pass"],
    "import hf_diffusionblocks": ["-c", "import hf_diffusionblocks"],
    "diffusionblocks --help": ["-m", "hf_diffusionblocks", "--help"],
    "torch, transformers": ["-c", _LIBRARIES],
    "torch, transformers, diffusers, accelerate, datasets": [
        "-c",
        f"{_LIBRARIES}; import accelerate, datasets; from diffusers import DiTTransformer2DModel, DiTPipeline",
    ],
    "all public names": ["-c", "from hf_diffusionblocks import *"],
}


def seconds(arguments: list[str]) -> float:
    """Processor seconds of one process."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    for name, arguments in CASES.items():
        print(f"{name:<56}{min(seconds(arguments) for _ in range(RUNS)):6.2f} s", flush=True)


RUNS = int(os.environ.get("RUNS", "5"))

if __name__ == "__main__":
    main()
