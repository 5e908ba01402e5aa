"""Config of blocked causal language models."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..config_checks import check_sizes
from ..configuration import DiffusionBlocksConfig
from ..partition import BlockPartition, balanced_layers
from ..suggest import unknown_name

READOUTS = ("clean", "exact", "edm")
CONTEXTS = ("cascade", "independent")
INITIALIZATIONS = ("identity", "default")

# The paper's settings (arXiv 2506.14202, App. B and E.4), as one preset.
PRESETS = {
    "paper": {
        "readout": "edm",
        "context": "independent",
        "auxiliary_layers": 0,
        "initialization": "default",
        "overlap": 0.1,
        "noise": {"p_mean": -1.2, "p_std": 1.2},
    }
}


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_LEGACY = ("rope_theta", "rope_scaling", "torch_dtype", "attn_implementation")
# Settings that change what flows between the modules of a decoder.
_OUTSIDE = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "final_logit_softcapping")
_MEND = "Models built like Llama, Mistral, Qwen2 and Qwen3 can be cut."


class BlockedCausalLMConfig(DiffusionBlocksConfig):
    """Config of ``BlockedForCausalLM``: ``DiffusionBlocksConfig`` and

    Args:
        base_config: the config of a transformers decoder as a dict, with its ``model_type``.
        readout: ``clean``, ``exact`` or ``edm``; see the module.
        context: ``cascade`` or ``independent``; see the module.
        auxiliary_layers: layers between a block's output and its head that only its training loss sees; cut from a
            trained base, 0 unless given. The last block of a cascade has none, and none are used once trained.
            ``layers_per_block`` is then by default such that blocks hold equally many layers, auxiliary ones included.
        initialization: ``identity`` zeroes the output projections of new layers of auxiliary layers and of all blocks
            but the first of a cascade, so that a block starts by passing on what it gets; ``default`` leaves the
            base's.
        noise_embedding_dim: width of the noise level's embedding, which modulates the layers of the noisy stream. Each
            layer has ``6 x hidden_size x noise_embedding_dim`` weights for it.
        pretrained: whether the blocks hold a trained base's weights.
        trained_blocks: blocks that were trained, in order; a cascade's block needs those below it.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> BlockedCausalLMConfig(base_config=base, num_blocks=3).layers_per_block  # and one auxiliary in the first two
        [1, 2, 3]
    """

    model_type = "blocked_causal_lm"

    readout: str = "clean"
    context: str = "cascade"
    auxiliary_layers: int = 1
    initialization: str = "identity"
    noise_embedding_dim: int = 24
    pretrained: bool = False
    trained_blocks: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        trained = self.trained_blocks or []
        whole = isinstance(trained, (list, tuple)) and all(
            isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in trained
        )
        if not whole:
            raise ValueError(f"trained_blocks={reprlib.repr(trained)} must list numbers of blocks, such as [0, 1].")
        self.trained_blocks = sorted(set(trained))
        base = self.make_base_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(base, name, None))
        self.tie_word_embeddings = False  # the head is tied by the forward pass, not by sharing parameters

    def _make_partition(self) -> BlockPartition:
        self._check_settings()
        if self.layers_per_block is None and isinstance(self.num_blocks, int) and self.num_blocks > 0:
            extra = [self.auxiliary_layers_of(b) for b in range(self.num_blocks)]
            self.layers_per_block = balanced_layers(self.num_layers, extra) if any(extra) else None
        return super()._make_partition()

    def _check_settings(self) -> None:
        for name, allowed in (("readout", READOUTS), ("context", CONTEXTS), ("initialization", INITIALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        if isinstance(self.auxiliary_layers, bool) or not isinstance(self.auxiliary_layers, int):
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers!r} must be a whole number of at least 0.")
        if self.auxiliary_layers < 0:
            raise ValueError(f"auxiliary_layers={self.auxiliary_layers} must be at least 0.")
        dim = self.noise_embedding_dim
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
            raise ValueError(f"noise_embedding_dim={dim!r} must be an even whole number of at least 2.")
        if self.auxiliary_layers > self.num_layers:
            raise ValueError(
                f"auxiliary_layers={self.auxiliary_layers} is more than the {self.num_layers} layers of the model."
            )
        if self.auxiliary_layers and self.readout != "clean":
            raise ValueError(
                f"auxiliary_layers={self.auxiliary_layers} needs readout='clean'; with readout={self.readout!r} set it "
                "to 0: there a block's own layers are its denoiser."
            )
        if self.preconditioning != "edm":
            raise ValueError(f"preconditioning={self.preconditioning!r} is for images; language models use 'edm'.")

    def complete_base_config(self, base_config: dict) -> dict:
        model_type = base_config.get("model_type")
        check_sizes(base_config, _SIZES, optional=True)
        if model_type is None:
            raise ValueError("base_config has no model_type: give the config of a decoder, such as 'llama'.")
        if not isinstance(model_type, str):
            raise ValueError(f"base_config's model_type={model_type!r:.60} must be a name, such as 'llama'.")
        try:
            config = AutoConfig.for_model(**base_config)
        except ValueError as error:
            raise ValueError(
                f"base_config's model_type={model_type!r} is not known to transformers: {error}"
            ) from error
        except Exception as error:  # the values may be a stranger's, and the class's own checks raise of many kinds
            raise ValueError(f"base_config does not describe a {model_type!r} model: {error!r}.") from error
        full = config.to_dict()
        if "num_hidden_layers" not in full:
            raise ValueError(
                f"a model of type {model_type!r} cannot be cut: its config has no num_hidden_layers. {_MEND}"
            )
        for name in _OUTSIDE:
            if full.get(name) not in (None, 1):
                raise ValueError(
                    f"a model of type {model_type!r} with {name}={full[name]} cannot be cut: it acts outside the "
                    f"layers' modules. {_MEND}"
                )
        dropped = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
        return {k: v for k, v in full.items() if k not in dropped}

    def make_base_config(self, layers: Sequence[int] | None = None) -> PreTrainedConfig:
        """The base's config; with ``layers``, that of a decoder of these layers of the base."""
        values = dict(self.base_config)
        if layers is not None:
            values["num_hidden_layers"] = len(layers)
            for name in ("layer_types", "no_rope_layers"):
                if values.get(name):
                    values[name] = [values[name][min(i, self.num_layers - 1)] for i in layers]
        return AutoConfig.for_model(**values)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's config, which ``generate`` builds its cache from."""
        return self.make_base_config()

    @property
    def num_layers(self) -> int:
        return int(self.base_config["num_hidden_layers"])

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.num_layers

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return int(self.base_config["vocab_size"])

    @property
    def hidden_size(self) -> int:
        """d, the width."""
        return int(self.base_config["hidden_size"])

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens."""
        return int(self.base_config.get("max_position_embeddings") or 2**31)

    @property
    def tied_head(self) -> bool:
        """Whether the head is the token embedding."""
        return bool(self.base_config.get("tie_word_embeddings", False))

    @property
    def two_stream(self) -> bool:
        """Whether the readout has a stream of noisy targets."""
        return self.readout != "clean"

    def auxiliary_layers_of(self, block: int) -> int:
        """Number of auxiliary layers of a block: none in the last block of a cascade, whose output is the model's."""
        last = self.context == "cascade" and block == self.num_blocks - 1
        return 0 if last or self.context == "independent" else self.auxiliary_layers


def check_base_settings(base_config: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for a misspelt setting in a base's config that was written by hand.

    transformers itself takes any name, and a published ``config.json`` may hold names that its class does not know.
    """
    model_type = base_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or "transformers_version" in base_config:
        return
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map, *_LEGACY}
    known = {name for name in known if not name.startswith("_")}
    for name in base_config:
        if name not in known and not name.startswith("_"):
            raise ValueError(unknown_name(f"{model_type} setting", name, known))


def config_fields() -> frozenset[str]:
    """Settings of a blocked language model besides its base and number of blocks."""
    fields = set(BlockedCausalLMConfig.__annotations__) | set(DiffusionBlocksConfig.__annotations__)
    return frozenset(fields - {"base_config", "num_blocks"})
