"""Rivals that train a classifier by local losses, side by side: accuracy, counted memory, time per epoch, over seeds.

    python benchmarks/classification_rivals.py run digits        # arms and seeds that are missing; resumable
    python benchmarks/classification_rivals.py run fashion --seeds 0
    python benchmarks/classification_rivals.py run fashion-vit   # 12 layers in 3 blocks, with the smaller network
    python benchmarks/classification_rivals.py run cifar10       # NoProp's network; needs the parquet files, see below
    python benchmarks/classification_rivals.py run cifar100      # the papers' sizes; from the Hub, for a GPU
    python benchmarks/classification_rivals.py table digits      # markdown

Two networks. NoProp's CNN (arXiv 2503.24322): backpropagation through T of its blocks, NoProp in three forms, and
DiffusionBlocks on it. NoProp-CT and -FM have one network and DiffusionBlocks three, where NoProp-DT and
backpropagation have T: they get that many times the epochs, so that all arms of a study run the network on equally many
images. A vision transformer: backpropagation, with and without activation checkpointing, and with L/B layers;
Forward-Forward in two forms; and the library's blocked models, of which greedy local cross-entropy is one; all with the
same epochs (of each block), but for the arm of L/B layers that gets as many as cost what the library's default blocks
cost, in counted FLOPs. An epoch of Forward-Forward by goodness runs two inputs per image.

Memory is counted on a real update: of a process that holds everything, and of a job that trains one part alone (the
largest of them; of blocked models what ``plan_memory`` counts). Seconds are the process's CPU time, with one thread.
Settings are small; learning rates were chosen among two or three on the digits. Digits and Fashion-MNIST come with
scikit-learn and Debian's package dataset-fashion-mnist, CIFAR-10 from ``../shared/data/cifar10/{train,test}.parquet``
(skipped with a reason without it).
"""

import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _studies import RESULTS, add_row, mean, missing_jobs, read_rows, run_jobs, study_parser

SEEDS = (0, 1, 2)
OUT = RESULTS / "classification-rivals.jsonl"
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
BLOCKS, STEPS = 5, 100  # T of NoProp-DT and of backpropagation; steps of inference of NoProp-CT and -FM


@dataclass(frozen=True)
class Study:
    """A data set and the sizes of what is trained on it."""

    data: str
    cnn: dict[str, Any] | None = None
    epochs: int = 0
    vit: dict[str, Any] | None = None
    vit_epochs: int = 0
    vit_blocks: int = 2
    batch: int = 64
    learning_rate: float = 5e-3
    vit_learning_rate: float = 2e-3
    warmup: int = 20
    loading: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, int | None] = field(default_factory=lambda: {"train": None, "test": None})
    num_classes: int = 10
    accelerated: bool = False  # on a GPU, if there is one; the others are compared by their CPU time


STUDIES = {
    "digits": Study(
        data="digits",
        cnn={"image_size": 8, "widths": (16, 32, 64), "hidden": 64, "dropout": 0.0},
        epochs=12,
        vit={"image_size": 8, "patch_size": 2, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 96},
        vit_epochs=12,
    ),
    "fashion": Study(
        data="fashion-mnist",
        cnn={"image_size": 28, "widths": (8, 16, 32), "hidden": 64, "dropout": 0.1},
        epochs=4,
        learning_rate=3e-3,
        samples={"train": 6000, "test": 2000},
    ),
    "fashion-vit": Study(
        data="fashion-mnist",
        vit={"image_size": 28, "patch_size": 7, "hidden_size": 64, "num_hidden_layers": 12, "intermediate_size": 128},
        vit_epochs=2,
        vit_blocks=3,
        vit_learning_rate=1e-3,
        warmup=75,
        samples={"train": 48000, "test": None},
    ),
    "cifar10": Study(
        data=str(CIFAR10),
        cnn={"image_size": 16, "channels": 3, "widths": (16, 32, 64), "hidden": 128, "dropout": 0.1},
        epochs=4,
        learning_rate=3e-3,
        loading={"image_size": 16},
        samples={"train": 3000, "test": 2000},
    ),
    # The networks of the two papers (arXiv 2503.24322; 2506.14202: 12 layers, width 128, 500 epochs), all images.
    "cifar100": Study(
        data="uoft-cs/cifar100",
        cnn={"image_size": 32, "channels": 3},
        epochs=150,
        vit={"image_size": 32, "patch_size": 4, "num_channels": 3, "hidden_size": 128, "num_hidden_layers": 12}
        | {"intermediate_size": 512, "hidden_dropout_prob": 0.1},
        vit_epochs=500,
        vit_blocks=3,
        batch=128,
        learning_rate=1e-3,
        vit_learning_rate=5e-4,
        warmup=3910,  # 10 epochs
        loading={"image_column": "img", "label_column": "fine_label"},
        num_classes=100,
        accelerated=True,
    ),
}


@dataclass(frozen=True)
class Arm:
    """How to make a model for a study, and how it differs in its training.

    Attributes:
        make: of a study; its seed is set.
        passes: of a CNN, networks that an update runs each image through, which divide the study's epochs.
        more: of a transformer, a factor on the study's epochs.
        learning_rate: if not the study's.
        training: further arguments, for the library's trainer.
    """

    make: Callable[[Study], Any]
    passes: float = 1.0
    more: Callable[[Study], float] = lambda study: 1.0
    learning_rate: float | None = None
    training: dict[str, Any] = field(default_factory=dict)


def _cnn(name: str, **settings: Any) -> Callable[[Study], Any]:
    def make(study: Study) -> Any:
        from hf_diffusionblocks.baselines import blocked_cnn, noprop
        from hf_diffusionblocks.baselines.noprop_network import CNNConfig

        kind = getattr(noprop, name, None) or getattr(blocked_cnn, name)
        return kind(CNNConfig(num_classes=study.num_classes, **study.cnn), **settings)

    return make


def _vit_config(study: Study, **settings: Any) -> Any:
    from transformers import ViTConfig

    common = {"num_channels": 1, "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "num_labels": study.num_classes}
    return ViTConfig(**(common | study.vit | settings))


def _backprop_vit(study: Study, checkpointing: bool = False, shallow: bool = False) -> Any:
    from transformers import ViTForImageClassification

    from hf_diffusionblocks.baselines.forward_forward import BackpropViT
    from hf_diffusionblocks.modeling import enable_checkpointing

    model = ViTForImageClassification((_shallow_config if shallow else _vit_config)(study))
    if checkpointing:
        enable_checkpointing(model)
    return BackpropViT(model)


def _shallow_config(study: Study) -> Any:
    config = _vit_config(study)
    config.num_hidden_layers //= study.vit_blocks
    return config


def _shallow_factor(study: Study) -> float:
    """Updates of the network of L/B layers that cost one of every block of the default, in FLOPs."""
    from hf_diffusionblocks import BlockedForImageClassification
    from hf_diffusionblocks.compute import training_flops
    from hf_diffusionblocks.families.categorical_config import PLAIN

    blocked = BlockedForImageClassification.config_from(_vit_config(study), study.vit_blocks)
    plain = BlockedForImageClassification.config_from(_shallow_config(study), 1, **PLAIN)
    return training_flops(blocked, batch_size=study.batch).flops / training_flops(plain, batch_size=study.batch).flops


def _forward_forward(study: Study, objective: str) -> Any:
    from hf_diffusionblocks.baselines.forward_forward import ForwardForwardViT

    return ForwardForwardViT(_vit_config(study, initializer_range=0.1), study.num_classes, objective)


def _blocked_vit(study: Study, **settings: Any) -> Any:
    from hf_diffusionblocks import BlockedForImageClassification

    return BlockedForImageClassification.from_base(_vit_config(study), num_blocks=study.vit_blocks, **settings)


_EXACT = {"auxiliary_layers": 0, "initialization": "default"}
_GREEDY = {"readout": "clean", "context": "cascade", **_EXACT}

CNN_ARMS = {
    f"CNN, backpropagation, T={BLOCKS}": Arm(_cnn("BackpropCNN", num_blocks=BLOCKS), BLOCKS),
    f"CNN, NoProp-DT, T={BLOCKS}": Arm(_cnn("NoPropDT", num_blocks=BLOCKS), BLOCKS),
    "CNN, NoProp-CT": Arm(_cnn("NoPropCT", num_steps=STEPS)),
    "CNN, NoProp-FM": Arm(_cnn("NoPropFM", num_steps=STEPS)),
    "CNN, DiffusionBlocks, B=3": Arm(_cnn("BlockedCNN"), 3),
    "CNN, DiffusionBlocks, B=3, cross-entropy": Arm(_cnn("BlockedCNN", loss="cross_entropy"), 3),
}
VIT_ARMS = {
    "ViT, backpropagation": Arm(_backprop_vit),
    "ViT, backpropagation, checkpointing": Arm(lambda study: _backprop_vit(study, True)),
    "ViT, backpropagation, L/B": Arm(lambda study: _backprop_vit(study, shallow=True)),
    "ViT, backpropagation, L/B, equal compute": Arm(
        lambda study: _backprop_vit(study, shallow=True),
        more=_shallow_factor,
    ),
    "ViT, Forward-Forward": Arm(lambda study: _forward_forward(study, "goodness"), learning_rate=5e-3),
    "ViT, Contrastive Forward-Forward": Arm(lambda study: _forward_forward(study, "contrastive"), learning_rate=5e-3),
    "ViT, greedy local cross-entropy": Arm(
        lambda study: _blocked_vit(study, **_GREEDY),
        training={"order": "simultaneous", "gradient": "local"},
    ),
    "ViT, DiffusionBlocks, the paper's": Arm(
        lambda study: _blocked_vit(study, preset="paper"), training={"gradient": "local"}
    ),
    "ViT, DiffusionBlocks, the paper's, noise higher": Arm(
        lambda study: _blocked_vit(study, preset="paper", noise={"p_mean": 1.0, "p_std": 1.0}),
        training={"gradient": "local"},
    ),
    "ViT, DiffusionBlocks, exact readout": Arm(
        lambda study: _blocked_vit(study, readout="exact", context="independent", auxiliary_layers=0),
        training={"gradient": "local"},
    ),
    "ViT, blocks, the library's default": Arm(_blocked_vit),
    "ViT, blocks, exact gradient": Arm(lambda study: _blocked_vit(study, **_EXACT), training={"gradient": "exact"}),
}


def arms_of(study: str) -> dict[str, Arm]:
    """The arms of a study by name."""
    return (CNN_ARMS if STUDIES[study].cnn else {}) | (VIT_ARMS if STUDIES[study].vit else {})


def epochs_of(study: Study, arm: str) -> float:
    """Passes over the data. Of NoProp's CNN all arms run networks on equally many images."""
    if arm in VIT_ARMS:
        return study.vit_epochs * VIT_ARMS[arm].more(study)
    return round(study.epochs * BLOCKS / CNN_ARMS[arm].passes)


def load(study: str, split: str) -> Any:
    """A split of a study's data.

    Raises:
        SystemExit: if the files of CIFAR-10 are not there.
    """
    from hf_diffusionblocks.data import load_image_dataset

    settings = STUDIES[study]
    if study == "cifar10" and not CIFAR10.is_dir():
        raise SystemExit(f"skipped: {CIFAR10} is missing; it holds train.parquet and test.parquet of CIFAR-10.")
    return load_image_dataset(settings.data, split, max_samples=settings.samples[split], **settings.loading)


def run_job(study: str, arm: str, seed: int) -> dict:
    """Train and score one arm with one seed."""
    import torch

    torch.set_num_threads(1)
    from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from hf_diffusionblocks.baselines.local_training import LocalClassifier, LocalTrainer, accuracy
    from hf_diffusionblocks.evaluation.classification import predict

    settings, one = STUDIES[study], arms_of(study)[arm]
    train, test = load(study, "train"), load(study, "test")
    torch.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator(check_available=True) if settings.accelerated else None
    model = one.make(settings).to(accelerator or "cpu")
    epochs = epochs_of(settings, arm)
    args = DiffusionBlocksTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=one.learning_rate or (settings.vit_learning_rate if arm in VIT_ARMS else settings.learning_rate),
        weight_decay=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        seed=seed,
        use_ema=False,
        cpu=accelerator is None,
        save_steps=0,
        logging_steps=10**6,
        disable_tqdm=True,
        **one.training,
    )
    machine = f"{platform.processor() or platform.machine()}, 1 thread" + (f", {accelerator}" if accelerator else "")
    blocked = not isinstance(model, LocalClassifier)
    trainer = (DiffusionBlocksTrainer if blocked else LocalTrainer)(model, args, train)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    start = time.process_time()
    if blocked:
        logits, labels = predict(model, test)
        score = float((logits.argmax(-1) == labels).double().mean())
    else:
        score = accuracy(model, test, seed=seed)
    scoring = time.process_time() - start
    by_steps = {}
    if blocked and model.config.two_stream:  # the label is denoised
        for steps in (1, 2, 4, 8):
            found, labels = predict(model, test, num_inference_steps=steps)
            by_steps[steps] = float((found.argmax(-1) == labels).double().mean())
    process, job = _memory(trainer)
    return {
        "study": study,
        "arm": arm,
        "seed": seed,
        "accuracy": score,
        **({"accuracy_by_steps": by_steps} if by_steps else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "updates": trainer.num_updates,
        "learning_rate": args.learning_rate,
        "cpu_seconds": seconds,
        "cpu_seconds_per_epoch": seconds / epochs,
        "cpu_seconds_per_1000_predictions": 1000 * scoring / len(test),
        "memory": process,
        "memory_of_a_job": job,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
    }


def _memory(trainer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind of a process that holds everything and of the largest job for one part, on a real update."""
    from hf_diffusionblocks import plan_memory
    from hf_diffusionblocks.baselines.local_training import LocalTrainer
    from hf_diffusionblocks.memory_counting import KINDS, measure_step

    if isinstance(trainer, LocalTrainer):
        uses = trainer.measure()
        job = max((use for part, use in uses.items() if part is not None), key=lambda use: use.total)
        return uses[None].to_dict(), job.to_dict()
    size = trainer.args.per_device_train_batch_size
    plan = plan_memory(trainer.model.config, batch_size=size, use_ema=False, alternatives=False, device="cpu")
    row = plan.worst("blocked")
    return measure_step(trainer).to_dict(), {kind: getattr(row, kind) for kind in KINDS} | {"total": row.total}


def rows_of(study: str) -> list[dict]:
    """The finished jobs of a study."""
    return [row for row in read_rows(OUT) if row["study"] == study]


def table(study: str) -> str:
    """Markdown: per arm the mean over seeds ± standard error, memory in KiB and CPU seconds."""
    rows = rows_of(study)
    if not rows:
        return f"no results of study {study!r} yet: python benchmarks/classification_rivals.py run {study}"
    lines = [
        "| arm | seeds | accuracy | parameters | epochs | CPU s per epoch | CPU s in all | KiB, process: weights / "
        "gradients / moments / activations | KiB, job |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms_of(study):
        mine = [r for r in rows if r["arm"] == arm]
        if not mine:
            continue
        first = mine[0]
        kinds = ("weights", "gradients", "moments", "activations")
        held = " / ".join(f"{first['memory'][kind] / 1024:.0f}" for kind in kinds)
        per_epoch, total = (statistics.mean(r[k] for r in mine) for k in ("cpu_seconds_per_epoch", "cpu_seconds"))
        lines.append(
            f"| {arm} | {len(mine)} | {mean([r['accuracy'] for r in mine])} | {first['parameters']:,} | "
            f"{first['epochs']:.3g} | {per_epoch:.2f} | {total:.0f} | {first['memory']['total'] / 1024:.0f}: {held} | "
            f"{first['memory_of_a_job']['total'] / 1024:.0f} |"
        )
    settings = STUDIES[study]
    lines += [
        "",
        f"{settings.samples['train'] or 'All'} training and {settings.samples['test'] or 'all'} test images, batch "
        f"{settings.batch}. {rows[0]['machine']}, {rows[0]['date']}. "
        f"`python benchmarks/classification_rivals.py run {study}`",
    ]
    return "\n".join(lines)


def main() -> None:
    args = study_parser(__doc__, ("run", "job", "table"), STUDIES).parse_args()
    if args.command == "job":
        add_row(OUT, run_job(args.study, args.arm, args.seed))
    elif args.command == "run":
        load(args.study, "test")
        todo = missing_jobs(rows_of(args.study), arms_of(args.study), args.seeds or SEEDS, args.only)
        run_jobs(__file__, args.study, todo, args.workers)
    else:
        print(table(args.study))


if __name__ == "__main__":
    main()
