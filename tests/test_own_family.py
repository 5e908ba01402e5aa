"""A family of a user's own, an MLP-Mixer, is one module and one call: this file. The battery and the commands take it.

The module is written as a user would write it outside of the package: a network, a config, a model, and
``register_family``. What follows it, from `OWN` on, is the tests.
"""

import json
import sys
from collections.abc import Iterator

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

import battery
import battery_table
import test_modeling
from hf_diffusionblocks import BlockedDiTPipeline, register_family
from hf_diffusionblocks.base_names import CUT_FROM
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.hub import model_card
from hf_diffusionblocks.modeling import BlockedPreTrainedModel
from hf_diffusionblocks.objectives import DenoisingScoreMatching, default_objective, register_objective
from hf_diffusionblocks.recipes.families import FAMILIES
from tiny import TinyImages, perturbed
from tiny_text import words_file


class MixerLayer(GradientCheckpointingLayer):
    """Mixes over tokens, then over channels."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        hidden = hidden + self.over_tokens((self.norm(hidden) * (1 + scale) + shift).mT).mT
        return hidden + self.mlp(hidden)


class Mixer(nn.Module):
    """A denoiser's raw network F(x, c_noise, class) of some layers."""

    def __init__(self, base: dict, num_layers: int):
        super().__init__()
        self.patch, self.side = base["patch_size"], base["sample_size"] // base["patch_size"]
        width, values = base["width"], base["in_channels"] * base["patch_size"] ** 2
        self.embed, self.head = nn.Linear(values, width), nn.Linear(width, values)
        self.label, self.noise = nn.Embedding(base["num_classes"] + 1, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(MixerLayer(self.side**2, width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        n, channels, p, s = len(x), x.shape[1], self.patch, self.side
        x = x.to(self.embed.weight.dtype)
        hidden = self.embed(x.reshape(n, channels, s, p, s, p).permute(0, 2, 4, 1, 3, 5).reshape(n, s * s, -1))
        c = nn.functional.silu(self.noise(c_noise.to(x.dtype)[:, None]) + self.label(labels))
        for layer in self.layers:
            hidden = layer(hidden, c)
        out = self.head(self.norm(hidden)).reshape(n, s, s, channels, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class BlockedMixerConfig(DiffusionBlocksConfig):
    model_type = "blocked_mixer"
    label_dropout: float = 0.1

    def complete_base_config(self, base_config: dict) -> dict:
        unknown = sorted(base_config.keys() - KEYS.keys())
        if unknown:
            raise ValueError(f"base_config has {unknown[0]!r}; a mixer's settings are {', '.join(KEYS)}.")
        return KEYS | base_config

    num_classes = property(lambda self: self.base_config["num_classes"])
    in_channels = property(lambda self: self.base_config["in_channels"])
    sample_size = property(lambda self: self.base_config["sample_size"])


KEYS = {"num_layers": 6, "width": 16, "sample_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}


class BlockedMixer(BlockedPreTrainedModel):
    config_class = BlockedMixerConfig

    def make_block(self, block: int) -> Mixer:
        return Mixer(self.config.base_config, len(self.partition.layers(block)))

    def run_block(self, block: int, scaled: Tensor, c_noise: Tensor, *, class_labels: Tensor) -> Tensor:
        return self.block(block)(scaled, c_noise, class_labels)

    def conditioning(self, batch: dict, drop: Tensor | None = None, null: Tensor | None = None) -> dict:
        labels = batch["class_labels"]
        return {"class_labels": labels if drop is None else labels.masked_fill(drop, self.config.num_classes)}

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        return iter(self.block(block).layers)

    def dummy_batch(self, batch_size: int) -> dict[str, Tensor]:
        size = self.config.sample_size
        pixels = torch.zeros(batch_size, self.config.in_channels, size, size)
        return {"pixel_values": pixels, "class_labels": torch.zeros(batch_size, dtype=torch.int64)}

    def check_batch(self, batch: dict) -> None:
        if "pixel_values" not in batch or "class_labels" not in batch:
            raise ValueError(f"a batch holds {sorted(batch)}; the trainer needs 'pixel_values' and 'class_labels'.")
        self.check_input(batch["pixel_values"], class_labels=batch["class_labels"])

    def check_input(self, z: Tensor, class_labels: Tensor | None = None) -> None:
        shape = [self.config.in_channels, self.config.sample_size, self.config.sample_size]
        if list(z.shape[1:]) != shape:
            raise ValueError(f"images have shape {list(z.shape)}; this model takes {['batch', *shape]}.")
        if class_labels is None or len(class_labels) != len(z):
            raise ValueError(f"give class_labels, one for each of {len(z)} images.")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            init.zeros_(module.bias)


def register() -> None:
    """What a user's module calls at its end; here a fixture does, and takes it back."""
    register_family(
        "mixer", BlockedMixer, like="dit", model_keys=KEYS, classes_key="num_classes", cut_from="an MLP-Mixer's config"
    )


# -- the tests ---------------------------------------------------------------------------------------------------


def tiny_mixer(num_blocks: int, blocks=None, seed: int = 0) -> BlockedMixer:
    config = BlockedMixer.config_from({}, num_blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlockedMixer(config, blocks=blocks)
    return perturbed(model, 0.1, seed).train()


OWN = battery.Family(
    tiny_mixer, battery.tiny_images, battery.tiny_labels, ".mlp", TinyImages, recipe=("mixer", *battery._SMALL_IMAGES)
)
RECIPE = {
    "family": "mixer",
    "model": {"num_layers": 3},
    "blocks": {"num_blocks": 3},
    "data": {"name": "digits", "max_samples": 60},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True},
    "sampling": {"num_inference_steps": 3},
    "evaluation": {"num_samples": 40, "num_draws": 1, "classifier_epochs": 1},
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register()
    yield
    for known in (FAMILIES, CUT_FROM):
        known.pop("mixer")


# Everything that the battery asks of a family, with the fixtures that it needs.
globals().update({name: vars(sys.modules[module])[name] for module, name in battery_table.checks()})
model, saved = test_modeling.model, test_modeling.saved
del test_its_commands_plan_train_and_evaluate  # noqa: F821  # below, with a recipe in a file


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    battery.parametrize(metafunc, {"mixer": OWN})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mixer") / "mixer.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_a_family_of_ones_own_has_all_commands(recipe, tmp_path, capsys):
    assert main(["plan", recipe]) == 0
    assert "blocked" in capsys.readouterr().out
    assert main(["train", recipe, "--output-dir", str(tmp_path / "run"), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert "class_agreement" in str(trained["figures"])
    assert "trained block by block" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert main(["evaluate", trained["model"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    samples = ["--classes", "3", "--steps", "2", "--output-dir", str(tmp_path / "samples")]
    assert main(["sample", trained["model"], *samples]) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 1
    assert type(BlockedDiTPipeline.from_pretrained(trained["model"]).model) is BlockedMixer
    assert type(AutoModel.from_pretrained(trained["model"])) is BlockedMixer
    assert main(["train", recipe, "--method", "end_to_end", "--no-report", "--output-dir", str(tmp_path / "e2e")]) == 0
    for block in range(3):
        job = ["--block", str(block), "--no-report", "--output-dir", str(tmp_path / f"b{block}")]
        assert main(["train", recipe, *job]) == 0
    parts = [str(tmp_path / f"b{block}" / "model") for block in range(3)]
    assert main(["merge", *parts, "--output-dir", str(tmp_path / "merged")]) == 0


def test_a_module_is_read_with_import(tmp_path, capsys, monkeypatch):
    path = tmp_path / "my_mixer_module.py"
    path.write_text("import test_own_family\n\ntest_own_family.register()\n")
    monkeypatch.delitem(FAMILIES, "mixer")
    recipe = tmp_path / "mixer.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert main(["plan", str(recipe)]) == 2
    assert "unknown family 'mixer'" in (error := capsys.readouterr().err) and "--import MODULE" in error
    assert main(["plan", str(recipe), "--import", str(path)]) == 0
    assert sys.modules.pop(path.stem).__file__ == str(path)
    for wrong in ("no_such_module_of_mine", str(tmp_path / "none.py")):
        assert main(["--import", wrong, "plan", str(recipe)]) == 2
        assert f"--import {wrong}: there is no such" in capsys.readouterr().err


@pytest.mark.parametrize("like", ["image_classification", "causal_lm", "masked_lm"])
def test_a_family_like_another_is_a_subclass_with_its_commands_and_its_own_settings(like, tmp_path, capsys):
    parent = FAMILIES[like].model_class
    fields = {"__annotations__": {"remark": str}, "remark": "", "model_type": f"blocked_own_{like}"}
    config_class = type("OwnConfig", (parent.config_class,), fields)
    own = type("OwnModel", (parent,), {"config_class": config_class})
    register_family("own", own, like=like, bases=("ForOwnTask",))
    try:
        name, *settings = battery.FAMILIES[like].recipe
        settings += ["family=own", "blocks.remark=mine", "training.max_steps=1", "--no-report"]
        if FAMILIES[like].has_text:
            settings.append(f"data.name={words_file(tmp_path, 400)}")
        assert main(["train", name, *settings, "--output-dir", str(tmp_path / "run"), "--json"]) == 0
        model = AutoModel.from_pretrained(json.loads(capsys.readouterr().out)["model"])
        assert type(model) is own and model.config.remark == "mine"
        assert type(default_objective(model.config)) is type(
            default_objective(
                parent.config_class.from_dict({**model.config.to_dict(), "model_type": parent.config_class.model_type})
            )
        )
        assert main(["evaluate", str(tmp_path / "run" / "model"), "--json"]) == 0
        with pytest.raises(ValueError, match="setting 'remarks': did you mean 'remark'"):
            own.config_from({}, remarks="")
    finally:
        FAMILIES.pop("own")
        CUT_FROM.pop("own")


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="family to be like 'dti': did you mean 'dit'"):
        register_family("mixer", BlockedMixer, like="dti")
    with pytest.raises(ValueError, match="'dit' is one of this library"):
        register_family("dit", BlockedMixer, like="dit")
    with pytest.raises(ValueError, match="field of a family 'layer_key': did you mean 'layers_key'"):
        register_family("mixer", BlockedMixer, like="dit", layer_key="depth")
    with pytest.raises(ValueError, match="'blocked_mixer' is that of the family 'mixer'"):
        register_family("other", BlockedMixer, like="dit")


def test_an_objective_of_ones_own_is_that_of_its_config(monkeypatch):
    from hf_diffusionblocks import objectives

    class Mine(DenoisingScoreMatching):
        """An objective of one's own."""

    monkeypatch.setattr(objectives, "_OWN", {})
    config = BlockedMixer.config_from({})
    assert type(default_objective(config)) is DenoisingScoreMatching
    register_objective(BlockedMixerConfig, Mine)
    assert type(default_objective(config)) is Mine


def test_its_card_is_that_of_a_denoiser():
    card = str(model_card(tiny_mixer(3), title="a mixer", usage="pass"))
    assert "A BlockedMixer cut into 3 blocks" in card and "denoising score matching" in card
