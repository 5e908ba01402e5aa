"""The sections of a recipe whose settings are the library's own, per family."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..config_checks import settle
from ..generation import BRIDGES
from ..masked_generation import ORDERS as UNMASKING_ORDERS
from ..masked_generation import UnmaskingConfig
from ..sampling import GRIDS, SOLVERS
from ..suggest import unknown_name

MODES = ("decode", "denoise")
FEATURE_NETWORKS = ("classifier", "inception")
TRAINED_TOKENIZERS = ("character", "byte", "bpe")


@dataclass
class ImageData:
    """Where images come from; see ``hf_diffusionblocks.data.load_image_dataset``.

    Attributes:
        test_fraction: hold out this share of each class of ``train_split`` to score on, in place of ``test_split``.
    """

    name: str = "digits"
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    channels: int | None = None
    data_dir: str | None = None
    train_files: str | None = None
    test_files: str | None = None
    max_samples: int | None = None
    scaling_factor: float = 1.0
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        settle(self, "data.")
        for name in ("image_size", "max_samples"):
            if getattr(self, name) is not None:
                _check_whole("data", self, **{name: 1})
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"data.test_fraction={self.test_fraction} must lie between 0 and 1.")


@dataclass
class TextData:
    """Where text comes from and how it becomes rows; see ``hf_diffusionblocks.data.load_text_dataset``.

    Attributes:
        name: of the source: ``pydoc``, a file, directory, pattern or list of files, or a data set's id. A recipe
            without one needs ``data.name=``.
        tokenizer: ``character``, ``byte`` or ``bpe``, trained on the training split; or a directory or Hub id. None is
            ``character``, or the base's own tokenizer where the recipe has a ``base``.
        vocab_size: number of tokens for ``bpe``.
        block_length: T, tokens per row.
        config_name, revision: of a data set on the Hub.
        max_samples, max_test_samples: keep the first so many rows. A stream needs both: it has no length of its own.
    """

    name: Any = None
    train_split: str = "train"
    test_split: str = "test"
    data_files: Any = None
    config_name: str | None = None
    revision: str | None = None
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 1024
    block_length: int = 256
    packing: str = "concatenate"
    test_fraction: float = 0.05
    max_samples: int | None = None
    max_test_samples: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 0
    num_proc: int | None = None

    def __post_init__(self) -> None:
        settle(self, "data.")
        _check_whole("data", self, block_length=2)
        for name in ("max_samples", "max_test_samples", "num_proc"):
            if getattr(self, name) is not None:
                _check_whole("data", self, **{name: 1})
        if self.streaming and (self.max_samples is None or self.max_test_samples is None):
            raise ValueError(
                f"data.streaming=true with data.max_samples={self.max_samples} and data.max_test_samples="
                f"{self.max_test_samples}: a stream of text has no length, so give both numbers of rows."
            )


@dataclass
class ImageSampling:
    """How images are sampled; every so many iterations during training too, if ``every`` is positive."""

    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    solver: str = "euler"
    grid: str = "karras"
    vae: str | None = None
    every: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("solver", SOLVERS), ("grid", GRIDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(f"sampling.{name}", getattr(self, name), allowed))
        settle(self, "sampling.")
        _check_whole("sampling", self, num_inference_steps=1, every=0)
        _check_guidance("sampling", self)


@dataclass
class TextSampling:
    """How text is generated.

    Attributes:
        prompts: what the samples start with.
        max_new_tokens: tokens to add.
        do_sample: draw tokens; otherwise take the likeliest.
        temperature, top_k, top_p: as in transformers; act on f.
        mode: ``decode``, from f as any language model; or ``denoise``, along the noise grid.
        steps: noise levels per token (``denoise``); one per block by default.
        grid, bridge: see ``DenoisingConfig``.
    """

    prompts: list[str] = field(default_factory=lambda: ["The "])
    max_new_tokens: int = 200
    do_sample: bool = True
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    mode: str = "decode"
    steps: int | None = None
    grid: str = "equal_probability"
    bridge: str = "posterior_mean"

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            self.prompts = [self.prompts]
        if self.prompts is None:
            self.prompts = []
        settle(self, "sampling.")
        if not self.prompts or not all(isinstance(prompt, str) and prompt for prompt in self.prompts):
            raise ValueError(
                f"the prompt is empty (sampling.prompts={self.prompts!r}): give at least one character to go on from."
            )
        for name, low in (("max_new_tokens", 1), ("top_k", 1), ("steps", 1)):
            value = getattr(self, name)
            if (value is not None or name == "max_new_tokens") and (
                isinstance(value, bool) or not isinstance(value, int) or value < low
            ):
                raise ValueError(f"sampling.{name}={value!r} must be a whole number of at least {low}.")
        if not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise ValueError(
                f"sampling.temperature={self.temperature!r} must be positive. The likeliest token: --temperature 0, "
                "or do_sample=false in a recipe."
            )
        if not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"sampling.top_p={self.top_p!r} must lie in (0, 1]; 1 leaves all tokens in.")
        for name, allowed in (("mode", MODES), ("grid", GRIDS), ("bridge", BRIDGES)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(f"sampling.{name}", getattr(self, name), allowed))


@dataclass
class MaskedSampling:
    """How a masked language model writes text and fills gaps.

    Attributes:
        prompts: texts to complete; ``<mask:12>`` in one is a gap of 12 tokens. May be empty: a text from nothing.
        max_new_tokens: tokens to add after each prompt, revealed in the same walk; 0 fills gaps only.
        steps, order, temperature, top_k, top_p: see ``UnmaskingConfig``.
    """

    prompts: list[str] = field(default_factory=lambda: ["The "])
    max_new_tokens: int = 120
    steps: int = 64
    order: str = "random"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            self.prompts = [self.prompts]
        settle(self, "sampling.")
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"sampling.prompts={self.prompts!r} must list texts; '' writes one from nothing.")
        _check_whole("sampling", self, max_new_tokens=0)
        if self.order not in UNMASKING_ORDERS:
            raise ValueError(unknown_name("sampling.order", self.order, UNMASKING_ORDERS))
        try:
            UnmaskingConfig(self.steps, self.order, self.temperature, self.top_p, self.top_k)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error


@dataclass
class ImageEvaluation:
    """How a trained model of images is scored."""

    num_samples: int = 1000
    guidance_scale: float = 1.0
    num_draws: int = 4
    held_out_samples: int | None = None
    batch_size: int = 250
    classifier_epochs: int = 10
    classifier_width: int = 32
    feature_network: str = "classifier"

    def __post_init__(self) -> None:
        settle(self, "evaluation.")
        whole = {"num_samples": 2, "num_draws": 1, "batch_size": 1, "classifier_epochs": 1, "classifier_width": 1}
        if self.held_out_samples is not None:
            whole["held_out_samples"] = 1
        _check_whole("evaluation", self, **whole)
        _check_guidance("evaluation", self)
        if self.feature_network not in FEATURE_NETWORKS:
            raise ValueError(
                unknown_name("evaluation.feature_network", self.feature_network, FEATURE_NETWORKS)
                + " Other networks can be used from Python (hf_diffusionblocks.metrics.ModuleFeatures)."
            )


@dataclass
class ClassPrediction:
    """How a classifier predicts.

    Attributes:
        num_inference_steps: noise levels that a label is denoised on; by default the model's own, which for
            ``readout="clean"`` are none: it reads the classes without noise.
        num_draws: noise draws whose probabilities are averaged.
    """

    num_inference_steps: int | None = None
    num_draws: int | None = None

    def __post_init__(self) -> None:
        settle(self, "sampling.")
        for name in ("num_inference_steps", "num_draws"):
            if getattr(self, name) is not None:
                _check_whole("sampling", self, **{name: 1})


@dataclass
class ClassEvaluation:
    """How a trained classifier is scored.

    Attributes:
        held_out_samples: images to score; None for all.
        batch_size: images per forward pass.
        num_bins: of the calibration error.
        steps: numbers of noise levels to give the accuracy for, where labels are denoised.
        draws: numbers of noise draws, whose probabilities are averaged, to give accuracy and calibration error for,
            where labels are denoised.
    """

    held_out_samples: int | None = None
    batch_size: int = 250
    num_bins: int = 15
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    draws: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        settle(self, "evaluation.")
        _check_whole("evaluation", self, batch_size=1, num_bins=1)
        if self.held_out_samples is not None:
            _check_whole("evaluation", self, held_out_samples=1)
        for name in ("steps", "draws"):
            for count in getattr(self, name):
                if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                    raise ValueError(f"evaluation.{name}={getattr(self, name)} must list whole numbers of at least 1.")


def _check_whole(section: str, settings: Any, **lowest: int) -> None:
    """Raise a ``ValueError`` for a setting that is no whole number of at least its lowest value."""
    for name, low in lowest.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{section}.{name}={value!r} must be a whole number of at least {low}.")


def _check_guidance(section: str, settings: Any) -> None:
    value = settings.guidance_scale
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{section}.guidance_scale={value!r} must be a finite number; 1 switches guidance off.")


@dataclass
class TextEvaluation:
    """How a trained language model is scored.

    Attributes:
        rows: held-out rows to score; None for all.
        batch_size: rows per forward pass.
        num_draws: noise levels drawn per token and block, for the likelihood bound; 2 or more give its error.
    """

    rows: int | None = None
    batch_size: int = 16
    num_draws: int = 4

    def __post_init__(self) -> None:
        settle(self, "evaluation.")
        for name in ("rows", "batch_size", "num_draws"):
            value = getattr(self, name)
            if value is None and name == "rows":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"evaluation.{name}={value!r} must be a whole number of at least 1.")
