"""The names of a run's files: what training writes, and what reports, ``watch`` and later commands find again."""

from pathlib import Path

UPDATES_NAME = "updates.jsonl"  # a line per update: block, update, loss, ...
EVALUATIONS_NAME = "evaluations.jsonl"  # a line per held-out evaluation
LOSS_NAME, SHARE_NAME = "eval_loss", "likelihood_share"  # in such a line; of a block with /block_0 behind
STATUS_NAME = "status.json"  # how far the run is, and where its blocks are
REPORT_NAME = "report.html"
RECIPE_NAME = "recipe.json"
RECORD_NAME = "run.json"  # where, when and by which command it was trained
MODEL_DIR = "model"
SAMPLES_DIR = "samples"
FIGURES_DIR = "figures"
FIGURES_NAME = "figures.json"
JOB_PREFIX = "blocks-"


def find_jobs(output_dir: Path) -> list[Path]:
    """The directories of the processes of a run."""
    return sorted(path for path in output_dir.glob(f"{JOB_PREFIX}[0-9]*") if path.is_dir())
