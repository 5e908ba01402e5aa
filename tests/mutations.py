"""Bugs of one line, each of which some test must catch: `python tests/mutations.py` (minutes), or `make test-slow`.

A copy of the package gets one bug at a time and the tests named beside it are run against it until one fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """A line of a module, what it becomes, and the tests that should notice."""

    what: str
    module: str
    line: str
    becomes: str
    tests: str


MUTATIONS = (
    Mutation(
        "an inner edge belongs to the cleaner block",
        "partition.py",
        "return (inner > sigma[..., None] * (1 + _EDGE_TOLERANCE)).sum(-1)",
        "return (inner >= sigma[..., None] * (1 - _EDGE_TOLERANCE)).sum(-1)",
        "test_partition.py",
    ),
    Mutation(
        "blocks are mirrored: the last layers get the highest noise",
        "partition.py",
        "first = sum(self.layers_per_block[:block])",
        "first = sum(self.layers_per_block[block + 1 :])",
        "test_partition.py",
    ),
    Mutation(
        "routing at inference uses the widened ranges",
        "partition.py",
        "return self.noise.widened(low, high, self.overlap) if training else (low, high)",
        "return self.noise.widened(low, high, self.overlap)",
        "test_partition.py",
    ),
    Mutation(
        "EDM's c_out forgets sigma_data",
        "preconditioning.py",
        "c_out=sigma * self.sigma_data / total.sqrt(),",
        "c_out=sigma / total.sqrt(),",
        "test_preconditioning.py",
    ),
    Mutation(
        "rectified flow's denoiser adds the velocity",
        "preconditioning.py",
        "c_skip=1 / (1 + sigma), c_out=-t, c_in=1 / (1 + sigma)",
        "c_skip=1 / (1 + sigma), c_out=t, c_in=1 / (1 + sigma)",
        "test_preconditioning.py test_text_to_image.py",
    ),
    Mutation(
        "the loss loses its weight",
        "objectives/score_matching.py",
        "return weight * (denoised - target).pow(2).flatten(1).mean(1)",
        "return weight.mean() * (denoised - target).pow(2).flatten(1).mean(1)",
        "test_objectives.py",
    ),
    Mutation(
        "a noisy target sees the clean token that it is a version of",
        "families/two_stream.py",
        "noisy = noisy[:, :, tokens - targets :]",
        "noisy = (noisy | torch.eye(tokens, dtype=torch.bool).roll(1, 1))[:, :, tokens - targets :]",
        "test_two_stream.py",
    ),
    Mutation(
        "packed documents see each other",
        "families/two_stream.py",
        "seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])",
        "seen = seen & (documents[:, None, :, None] >= documents[:, None, None, :])",
        "test_two_stream.py test_causal_lm.py",
    ),
    Mutation(
        "the cosine schedule's weight is that of the linear one",
        "masking.py",
        "return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))",
        "return 1 / t",
        "test_masking.py",
    ),
    Mutation(
        "sampling takes a step the wrong way",
        "sampling.py",
        "noisy, z = z, z + (sigma_next - sigma) * (z - denoised) / sigma",
        "noisy, z = z, z - (sigma_next - sigma) * (z - denoised) / sigma",
        "test_sampling.py",
    ),
    Mutation(
        "the averages of a resting block are taken from the active one",
        "training/residency.py",
        'return name.startswith(f"blocks.{block}.")',
        'return name.startswith("blocks.0.")',
        "test_residency.py",
    ),
    Mutation(
        "the exact readout divides by sigma once",
        "families/causal_lm_targets.py",
        "z / sigma.float()[..., None] ** 2, table",
        "z / sigma.float()[..., None], table",
        "test_causal_lm.py test_next_token.py",
    ),
)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails with a bug in the package; None if none does."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        path = copy / "hf_diffusionblocks" / mutation.module
        text = path.read_text(encoding="utf-8")
        code = [i for i in _found(text, mutation.line)]
        if len(code) != 1:
            raise ValueError(f"{mutation.module} holds {mutation.line!r} {len(code)} times: name one line.")
        path.write_text(text[: code[0]] + mutation.becomes + text[code[0] + len(mutation.line) :], encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT / 'tests'}"}
        names = [str(ROOT / "tests" / name) for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *names]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (?:.*/)?(test_\S+\.py::\S+)", done.stdout, flags=re.MULTILINE)
    if found is None and done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return found.group(1) if found else None


def _found(text: str, line: str) -> list[int]:
    """Where a line's code stands, docstrings and comments left out."""
    quoted = [m.span() for m in re.finditer(r'"""(?:.|\n)*?"""|#[^\n]*', text)]
    starts = [m.start() for m in re.finditer(re.escape(line), text)]
    return [s for s in starts if not any(a <= s < b for a, b in quoted)]


def main() -> int:
    missed = 0
    print("| bug of one line | in | caught by |\n|---|---|---|")
    for mutation in MUTATIONS:
        test = caught_by(mutation)
        missed += test is None
        print(f"| {mutation.what} | `{mutation.module}` | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
