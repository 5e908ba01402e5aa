"""The DiT family: conversion of diffusers' DiTs, and what only this family has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from huggingface_hub.constants import HF_HUB_CACHE

from hf_diffusionblocks.families.dit import BlockedDiTConfig, BlockedDiTModel
from hf_diffusionblocks.serialization import same_tensors
from tiny import NUM_CLASSES, perturbed, tiny_dit

# transformer/config.json of facebook/DiT-XL-2-256 and the keys that later versions of its class wrote besides.
PUBLISHED: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def base_dit(num_layers: int = 4, seed: int = 0, **settings: Any) -> DiTTransformer2DModel:
    """A small DiT of diffusers' own, nothing zero-initialised."""
    small = {
        "num_layers": num_layers,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sample_size": 8,
        "in_channels": 2,
        "patch_size": 2,
        "num_embeds_ada_norm": NUM_CLASSES,
    }
    torch.manual_seed(seed)
    return perturbed(DiTTransformer2DModel(**(small | settings)), seed=seed).eval()


def inputs(base: DiTTransformer2DModel) -> tuple[torch.Tensor, torch.Tensor]:
    size = base.config.sample_size
    noise = torch.randn(3, base.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([0, NUM_CLASSES - 1, NUM_CLASSES])


# -- from_base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_channels", [None, 4])
@torch.no_grad()
def test_one_block_with_edm_is_the_base_network_preconditioned(out_channels):
    base = base_dit(out_channels=out_channels)
    model = BlockedDiTModel.from_base(base, num_blocks=1)
    noise, labels = inputs(base)
    for sigma in (80.0, 1.0, 0.3, 0.002):
        z = sigma * noise
        total = torch.tensor(sigma**2 + 0.25)
        t = torch.full((3,), sigma).log() / 4
        network = base(z / total.sqrt(), timestep=t, class_labels=labels).sample[:, :2]
        expected = 0.25 / total * z + sigma * 0.5 / total.sqrt() * network
        denoised = model.denoise(z, sigma, class_labels=labels)
        torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-6 * max(sigma, 1))


@pytest.mark.parametrize("out_channels", [None, 4])
@torch.no_grad()
def test_one_block_with_vp_epsilon_is_the_bases_noise_prediction(out_channels):
    base = base_dit(out_channels=out_channels)
    model = BlockedDiTModel.from_base(base, num_blocks=1, preconditioning="vp_epsilon", noise_schedule=SCHEDULE)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    noise, labels = inputs(base)
    for step in (0, 1, 17, 250, 500, 998, 999):
        sigma = ((1 - alphas[step]) / alphas[step]).sqrt().float()
        x = noise  # the base's own, variance-preserving state; z = x sqrt(1 + sigma^2)
        z = x * (1 + sigma**2).sqrt()
        epsilon = base(x, timestep=torch.full((3,), step), class_labels=labels).sample[:, :2]
        denoised = model.denoise(z, sigma, class_labels=labels)
        # D = z - sigma F   (EDM, arXiv 2206.00364, Table 1, column VP)
        torch.testing.assert_close((z - denoised) / sigma, epsilon, rtol=1e-4, atol=2e-5)
        beside = base(x, timestep=torch.full((3,), step - 7), class_labels=labels).sample[:, :2]
        assert (beside - epsilon).abs().max() > 1e-3  # a wrong step would be seen


@pytest.mark.parametrize(
    "settings, layers",
    [
        ({"num_blocks": 1}, [[0, 1, 2, 3, 4, 5, 6]]),
        ({"num_blocks": 3}, [[0, 1, 2], [3, 4], [5, 6]]),
        ({}, [[0, 1, 2], [3, 4], [5, 6]]),
        ({"num_blocks": 7}, [[0], [1], [2], [3], [4], [5], [6]]),
        ({"layers_per_block": [2, 4, 1]}, [[0, 1], [2, 3, 4, 5], [6]]),
    ],
)
def test_layers_are_copied_in_order_and_every_block_gets_stem_and_head(settings, layers):
    base = base_dit(7)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = BlockedDiTModel.from_base(base, **settings)
    assert [list(model.partition.layers(b)) for b in model.resident_blocks] == layers
    for block, numbers in enumerate(layers):
        module = model.block(block)
        assert len(module.transformer_blocks) == module.config.num_layers == len(numbers)
        for here, there in zip(module.transformer_blocks, numbers, strict=True):
            assert same_tensors(here.state_dict(), base.transformer_blocks[there].state_dict())
        for part in ("pos_embed", "proj_out_1", "proj_out_2"):
            assert same_tensors(getattr(module, part).state_dict(), getattr(base, part).state_dict())
        assert torch.equal(module.pos_embed.pos_embed, base.pos_embed.pos_embed)
    # copies: training the blocks leaves the base and the other blocks alone
    with torch.no_grad():
        for _, parameter in model.block_parameters(0):
            parameter.add_(1)
    assert same_tensors(base.state_dict(), before)
    if len(layers) > 1:
        assert torch.equal(model.block(1).proj_out_2.weight, base.proj_out_2.weight)


def test_three_six_three():
    model = BlockedDiTModel.from_base(base_dit(12), num_blocks=3, layers_per_block=[3, 6, 3])
    assert [len(model.block(b).transformer_blocks) for b in range(3)] == [3, 6, 3]
    assert model.config.layers_per_block == [3, 6, 3]


@torch.no_grad()
def test_a_learned_variance_is_kept_in_the_weights_and_left_out_of_the_estimate():
    base = base_dit(out_channels=4)
    model = BlockedDiTModel.from_base(base, num_blocks=2)
    noise, labels = inputs(base)
    before = model.denoise(noise, 0.3, class_labels=labels)
    assert before.shape == noise.shape and model.config.out_channels == 4
    head = model.block(1).proj_out_2
    rows = torch.arange(head.out_features) % 4 >= 2  # [patch, patch, channel], channels 2 and 3 are the variance
    head.bias[rows] += 1
    assert torch.equal(model.denoise(noise, 0.3, class_labels=labels), before)
    head.bias[~rows] += 1
    assert not torch.allclose(model.denoise(noise, 0.3, class_labels=labels), before)


def test_a_config_alone_gives_a_new_model():
    base = base_dit()
    model = BlockedDiTModel.from_base(base.config, num_blocks=2)
    assert {k: v.shape for k, v in model.block(0).state_dict().items()} == {
        k: v.shape for k, v in BlockedDiTModel.from_base(base, num_blocks=2).block(0).state_dict().items()
    }
    for block in range(2):  # DiT (arXiv 2212.09748), section 3.2: modulation and head start at zero
        module = model.block(block)
        zero = [module.proj_out_1, module.proj_out_2, *(layer.norm1.linear for layer in module.transformer_blocks)]
        assert not any(p.any() for part in zero for p in part.parameters())
        assert module.pos_embed.proj.weight.any() and module.transformer_blocks[0].attn1.to_q.weight.any()
    noise, labels = inputs(base)
    c_skip = 0.25 / (0.3**2 + 0.25)
    torch.testing.assert_close(model.denoise(noise, 0.3, class_labels=labels), c_skip * noise)


def test_the_dtype_and_mode_of_the_base_are_kept():
    for dtype in (torch.float32, torch.bfloat16):
        model = BlockedDiTModel.from_base(base_dit().to(dtype).train(), num_blocks=2)
        assert {p.dtype for p in model.parameters()} == {dtype} and model.training
        assert model.to_base(block=1).dtype == dtype
    assert not BlockedDiTModel.from_base(base_dit(), num_blocks=2).training


def pipeline_of(base: DiTTransformer2DModel) -> DiTPipeline:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=base.config.in_channels)
    return DiTPipeline(base, vae, DDIMScheduler(**(SCHEDULE | {"beta_end": 0.03})))


@pytest.mark.parametrize("source", ["model", "directory", "pipeline", "pipeline directory"])
def test_every_form_of_a_base_gives_the_same_model(tmp_path, source):
    base = base_dit()
    settings: dict[str, Any] = {"num_blocks": 2, "preconditioning": "vp_epsilon"}
    if source in ("model", "directory"):
        settings["noise_schedule"] = SCHEDULE | {"beta_end": 0.03}
    given: Any = base
    if source == "directory":
        base.save_pretrained(tmp_path / "dit")
        given = tmp_path / "dit"
    elif source != "model":
        given = pipeline_of(base)
        if source == "pipeline directory":
            given.save_pretrained(tmp_path / "pipe")
            given = str(tmp_path / "pipe")
    model = BlockedDiTModel.from_base(given, **settings)
    expected = BlockedDiTModel.from_base(
        base, num_blocks=2, preconditioning="vp_epsilon", noise_schedule=SCHEDULE | {"beta_end": 0.03}
    )
    assert model.partition == expected.partition and model.preconditioning == expected.preconditioning
    assert same_tensors(model.state_dict(), expected.state_dict())
    assert same_tensors(dict(model.named_buffers()), dict(expected.named_buffers()))
    noise, labels = inputs(base)
    outputs = [m.denoise(noise, 0.3, class_labels=labels) for m in (model, expected)]
    assert torch.equal(*outputs)


def test_a_converted_model_survives_its_files(tmp_path):
    model = BlockedDiTModel.from_base(
        pipeline_of(base_dit(out_channels=4)), num_blocks=2, preconditioning="vp_epsilon", label_dropout=0.0
    )
    model.save_pretrained(tmp_path / "model")
    loaded = BlockedDiTModel.from_pretrained(tmp_path / "model")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.partition == model.partition and loaded.preconditioning == model.preconditioning
    assert loaded.config.label_dropout == 0.0


@pytest.mark.parametrize(
    "base, settings, message",
    [
        (torch.nn.Linear(2, 2), {}, "Linear cannot be cut by BlockedDiTModel: give a diffusers DiTTransformer2DModel"),
        (None, {}, "NoneType cannot be cut"),
        ("/nowhere/dit", {}, "there is no directory /nowhere/dit"),
        (base_dit(), {"num_blocks": 5}, "num_blocks=5 is more than the 4 layers"),
        (base_dit(), {"num_blocks": 0}, "num_blocks=0 must be a whole number"),
        (base_dit(), {"num_blocks": 2, "layers_per_block": [4]}, "must name 2 numbers that sum to"),
        (base_dit(), {"overlapp": 0.1}, "unknown setting 'overlapp': did you mean 'overlap'"),
        (base_dit(), {"preconditioning": "vp_epsilon"}, "needs noise_schedule"),
        (base_dit(out_channels=3), {}, "out_channels=3 must be in_channels=2, or twice that"),
        ({"num_layer": 3}, {}, "unknown DiT setting 'num_layer': did you mean 'num_layers'"),
        ({"sample_size": 9}, {}, "sample_size=9 is not a multiple of patch_size=2"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, {}, "= 6 must be a multiple of 4"),
    ],
)
def test_bases_and_settings_that_are_refused(base, settings, message):
    with pytest.raises(ValueError, match=message):
        BlockedDiTModel.from_base(base, **settings)


def test_a_directory_without_a_dit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds neither a DiT .* nor a DiTPipeline"):
        BlockedDiTModel.from_base(tmp_path)
    tiny_dit(1, 1).save_pretrained(tmp_path / "blocked")
    with pytest.raises(ValueError, match="blocked holds blocked_dit, which BlockedDiTModel cannot cut"):
        BlockedDiTModel.from_base(tmp_path / "blocked")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="vae holds AutoencoderKL, which"):
        BlockedDiTModel.from_base(tmp_path / "vae")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own call
@pytest.mark.parametrize("kind", ["model", "pipeline"])
def test_a_base_of_the_hub_converts_from_the_cache(kind):
    repo = Path(HF_HUB_CACHE) / f"models--someone--dit-{kind}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    base = base_dit()
    (base if kind == "model" else pipeline_of(base)).save_pretrained(snapshot)
    model = BlockedDiTModel.from_base(f"someone/dit-{kind}", num_blocks=1)
    assert same_tensors(model.to_base().state_dict(), base.state_dict())
    with pytest.raises(ValueError, match="someone/nothing holds neither a DiT"):
        BlockedDiTModel.from_base("someone/nothing")


# -- to_base -----------------------------------------------------------------------------------------------------


def public(config: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


@pytest.mark.parametrize("through_files", [False, True])
@torch.no_grad()
def test_one_block_is_given_back_bitwise(tmp_path, through_files):
    base = base_dit(out_channels=4)
    model = BlockedDiTModel.from_base(base, num_blocks=1)
    if through_files:
        model.save_pretrained(tmp_path / "model")
        model = BlockedDiTModel.from_pretrained(tmp_path / "model")
    back = model.to_base()
    assert same_tensors(back.state_dict(), base.state_dict()) and public(back.config) == public(base.config)
    assert same_tensors(dict(back.named_buffers()), dict(base.named_buffers()))
    noise, labels = inputs(base)
    t = torch.tensor([3, 500, 999])
    assert torch.equal(back(noise, t, class_labels=labels).sample, base(noise, t, class_labels=labels).sample)
    back.save_pretrained(tmp_path / "back")
    assert same_tensors(DiTTransformer2DModel.from_pretrained(tmp_path / "back").state_dict(), base.state_dict())


@torch.no_grad()
def test_one_of_several_blocks_is_given_back_as_a_dit_of_its_layers():
    model = tiny_dit(3)
    back = model.to_base(block=1)
    assert len(back.transformer_blocks) == back.config.num_layers == 2
    assert same_tensors(back.state_dict(), model.block(1).state_dict())
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    t = torch.tensor([0.3, 0.4])
    expected = model.run_block(1, noise, t, class_labels=labels)
    assert torch.equal(back.eval()(noise, t, class_labels=labels).sample, expected)
    back.proj_out_1.weight.add_(1)
    assert not torch.equal(back.proj_out_1.weight, model.block(1).proj_out_1.weight)
    alone = tiny_dit(3, blocks=[1])
    assert same_tensors(alone.to_base(block=1).state_dict(), model.block(1).state_dict())


def test_several_blocks_cannot_be_given_back_as_one():
    with pytest.raises(ValueError, match=r"a model of 3 blocks cannot be given back as one DiT.*to_base\(block=b\)"):
        tiny_dit(3).to_base()
    with pytest.raises(ValueError, match="block 3 does not exist"):
        tiny_dit(3).to_base(block=3)
    with pytest.raises(ValueError, match="block 0 is not loaded"):
        tiny_dit(3, blocks=[1]).to_base(block=0)


# -- the published layout ----------------------------------------------------------------------------------------


def test_the_published_config_is_understood():
    config = BlockedDiTModel.config_from(PUBLISHED, num_blocks=4)
    assert config.layers_per_block == [7, 7, 7, 7] and config.num_classes == 1000
    assert (config.in_channels, config.out_channels, config.sample_size) == (4, 8, 32)
    with torch.device("meta"):
        model, whole = BlockedDiTModel(config), DiTTransformer2DModel(**config.base_config)
    layers = {k: v.shape for k, v in whole.state_dict().items()}
    for block in range(4):
        for key, value in model.block(block).state_dict().items():
            assert layers[key] == value.shape
    d = 16 * 72
    layer = 4 * (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d) + (d * d + 258 * d) + 1001 * d
    stem_and_head = (4 * 2 * 2 * d + d) + (2 * d * d + 2 * d) + (2 * 2 * 8 * d + 2 * 2 * 8)
    assert sum(p.numel() for p in whole.parameters()) == 28 * layer + stem_and_head
    assert sum(p.numel() for p in model.parameters()) == 28 * layer + 4 * stem_and_head


@pytest.mark.parametrize(
    "name, value",
    [("cross_attention_dim", 768), ("num_vector_embeds", 100), ("double_self_attention", True)],
)
def test_settings_of_its_old_class_that_are_in_use_are_refused(name, value):
    with pytest.raises(ValueError, match=f"unknown DiT setting '{name}'"):
        BlockedDiTModel.config_from(PUBLISHED | {name: value})


def write_published(directory: Path, base: DiTTransformer2DModel) -> Path:
    """A pipeline's directory as it is published: the old class name and its keys in the transformer's config."""
    pipeline_of(base).save_pretrained(directory)
    path = directory / "transformer" / "config.json"
    config = PUBLISHED | public(json.loads(path.read_text()))
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "norm_eps"}))
    assert json.loads(path.read_text())["_class_name"] == "Transformer2DModel"
    return directory


def test_a_published_directory_converts(tmp_path):
    base = base_dit(5, in_channels=4, out_channels=8)
    directory = write_published(tmp_path / "pipe", base)
    for given in (directory, directory / "transformer"):
        model = BlockedDiTModel.from_base(
            given, num_blocks=2, preconditioning="vp_epsilon", noise_schedule=SCHEDULE, id2label={0: "tench"}
        )
        assert same_tensors(model.block(0).transformer_blocks[2].state_dict(), base.transformer_blocks[2].state_dict())
        assert not set(model.config.base_config) - set(public(base.config))
        assert model.config.id2label == {0: "tench"}


@pytest.mark.slow
def test_the_published_size_converts_with_its_weights(tmp_path):
    settings = BlockedDiTModel.config_from(PUBLISHED).base_config
    with torch.device("meta"):
        base = DiTTransformer2DModel(**settings).to(torch.bfloat16)
    base = base.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    model = BlockedDiTModel.from_base(base, num_blocks=4)
    model.save_pretrained(tmp_path / "model")
    del model
    loaded = BlockedDiTModel.from_pretrained(tmp_path / "model", blocks=[2])
    for here, there in enumerate(range(14, 21)):
        assert same_tensors(
            loaded.block(2).transformer_blocks[here].state_dict(), base.transformer_blocks[there].state_dict()
        )


# -- inputs and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, labels, message",
    [
        ((2, 1, 8, 8), None, "class_labels is missing: give one label of 0 to 10"),
        ((2, 1, 8, 8), torch.tensor([0, 11]), "class_labels run from 0 to 11; allowed are 0 to 9, and 10 for no class"),
        ((2, 1, 8, 8), torch.tensor([-1, 0]), "class_labels run from -1 to 0"),
        ((2, 1, 8, 8), torch.tensor([1]), r"class_labels has shape \[1\]"),
        ((2, 1, 8, 8), torch.tensor([[1], [2]]), r"class_labels has shape \[2, 1\]"),
        ((2, 1, 8, 8), torch.tensor([1.0, 2.0]), "dtype torch.float32: give whole numbers"),
        ((2, 3, 8, 8), torch.tensor([1, 2]), r"has shape \[2, 3, 8, 8\]; this model takes \[batch, 1, 8, 8\]"),
        ((2, 1, 9, 9), torch.tensor([1, 2]), r"the input has shape \[2, 1, 9, 9\]"),
        ((2, 1, 8, 6), torch.tensor([1, 2]), r"the input has shape \[2, 1, 8, 6\]"),
        ((2, 64), torch.tensor([1, 2]), r"the input has shape \[2, 64\]"),
    ],
)
def test_inputs_that_do_not_fit(shape, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit(1, 1).denoise(torch.zeros(shape), 0.3, class_labels=labels)


@torch.no_grad()
def test_labels_matter_and_the_null_class_is_one_of_them():
    model = tiny_dit(1, 1)
    z = torch.randn(1, 1, 8, 8).expand(NUM_CLASSES + 1, 1, 8, 8)
    outputs = model.denoise(z, 0.3, class_labels=torch.arange(NUM_CLASSES + 1))
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == NUM_CLASSES + 1


def test_no_module_drops_labels_by_itself_even_in_training():
    model = tiny_dit(2, 2, label_dropout=0.9).train()
    embeddings = [m for m in model.modules() if isinstance(m, LabelEmbedding)]
    assert embeddings and all(m.embedding_table.num_embeddings == NUM_CLASSES + 1 for m in embeddings)
    z, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % NUM_CLASSES
    assert torch.equal(model.denoise(z, 0.3, class_labels=labels), model.eval().denoise(z, 0.3, class_labels=labels))


def test_names_of_classes_are_kept(tmp_path):
    names = {i: f"class {i}" for i in range(NUM_CLASSES)}
    tiny_dit(1, 1, id2label=names).save_pretrained(tmp_path / "model")
    assert BlockedDiTConfig.from_pretrained(tmp_path / "model").id2label == names
