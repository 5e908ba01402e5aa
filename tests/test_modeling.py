"""What every family of blocked models must do. A new family is one line in `FAMILIES`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_diffusionblocks import serialization
from hf_diffusionblocks.modeling import BlockedPreTrainedModel, DenoiserOutput, format_block_parameters
from hf_diffusionblocks.preconditioning import expand
from tiny import IMAGE_SIZE, NUM_CLASSES, as_users_run, tiny_dit
from tiny_prompts import FLUX, PIXART, SD3, prompts, tiny_flux, tiny_pixart, tiny_sd3
from tiny_vit import WIDTH, images, new_vit

BATCH = 4


@dataclass(frozen=True)
class Family:
    """A family of the battery.

    Attributes:
        build: ``build(num_blocks, blocks=None, seed=0)`` gives a tiny model in which nothing is zero-initialised.
        clean: a batch of clean samples.
        conditioning: what `denoise` takes besides, for that batch.
        mlp: how the name of a layer's MLP ends.
        is_denoiser: whether the model is EDM's denoiser of a raw network, and `forward` gives its estimate.
    """

    build: Callable[..., BlockedPreTrainedModel]
    clean: Callable[[], Tensor]
    conditioning: Callable[[], dict[str, Any]]
    mlp: str
    is_denoiser: bool = True

    def noisy(self, sigma: float) -> Tensor:
        return self.clean() + sigma * torch.randn(self.clean().shape, generator=torch.Generator().manual_seed(1))


def tiny_images() -> Tensor:
    return torch.rand(BATCH, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_labels() -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([0, 1, NUM_CLASSES - 1, NUM_CLASSES])}


def tiny_vit(num_blocks: int, blocks: Any = None, seed: int = 0) -> BlockedPreTrainedModel:
    return new_vit(num_blocks, blocks=blocks, seed=seed, perturbation=0.1, preset="paper").train()


def tiny_targets() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


def tiny_pictures() -> dict[str, Any]:
    return {"pixel_values": images(BATCH)}


FAMILIES = [
    pytest.param(Family(tiny_dit, tiny_images, tiny_labels, ".ff"), id="dit"),
    pytest.param(Family(tiny_vit, tiny_targets, tiny_pictures, ".mlp", is_denoiser=False), id="image-classification"),
    pytest.param(Family(tiny_pixart, tiny_images, partial(prompts, PIXART), ".ff"), id="pixart"),
    pytest.param(Family(tiny_sd3, tiny_images, partial(prompts, SD3), ".ff"), id="sd3"),
    pytest.param(Family(tiny_flux, tiny_images, partial(prompts, FLUX), ".ff"), id="flux"),
]


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return request.param


@pytest.fixture
def model(family) -> BlockedPreTrainedModel:
    return family.build(3)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def middle(model: BlockedPreTrainedModel, block: int) -> float:
    """A noise level well inside a block's range."""
    low, high = model.partition.range(block)
    return (low * high) ** 0.5


def run(model: BlockedPreTrainedModel, family: Family, block: int) -> Tensor:
    sigma = middle(model, block)
    return model.denoise(family.noisy(sigma), sigma, **family.conditioning())


def assert_same(a: BlockedPreTrainedModel, b: BlockedPreTrainedModel) -> None:
    """Bitwise equal weights and buffers, persistent or not."""
    assert serialization.same_tensors(a.state_dict(), b.state_dict())
    assert serialization.same_tensors(dict(a.named_buffers()), dict(b.named_buffers()))


# -- files -------------------------------------------------------------------------------------------------------


def test_the_files_are_config_shared_blocks_and_index(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "block-00.safetensors",
        "block-01.safetensors",
        "block-02.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "shared.safetensors",
    ]


def test_each_weight_lies_in_the_file_of_its_block_and_the_index_says_so(model, saved):
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    found = {}
    for path in saved.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[key] = path.name
                torch.testing.assert_close(file.get_tensor(key), model.state_dict()[key], rtol=0, atol=0)
    assert found == index["weight_map"]
    assert found.keys() == model.state_dict().keys()
    for block in range(3):
        keys = {key for key in found if key.startswith(f"blocks.{block}.")}
        assert keys == {key for key, name in found.items() if name == f"block-{block:02d}.safetensors"} != set()
    assert index["metadata"]["total_size"] == serialization.bytes_of(model.state_dict().values())
    for name, digest in index["metadata"]["sha256"].items():
        assert serialization.sha256(saved / name) == digest


@pytest.mark.parametrize("load", ["own", "auto", "string"])
def test_save_and_load_is_bitwise(family, model, saved, load):
    if load == "auto":
        loaded = AutoModel.from_pretrained(saved)
        assert type(AutoConfig.from_pretrained(saved)) is type(model.config)
    else:
        loaded = type(model).from_pretrained(str(saved) if load == "string" else saved)
    assert type(loaded) is type(model) and not loaded.training
    assert_same(loaded, model)
    for block in range(3):
        assert torch.equal(run(loaded, family, block), run(model, family, block))


def test_config_json_alone_rebuilds_the_model(model, saved):
    for path in saved.glob("*.safetensors*"):
        path.unlink()
    config = AutoConfig.from_pretrained(saved)
    rebuilt = type(model)(config)
    assert rebuilt.partition == model.partition and rebuilt.preconditioning == model.preconditioning
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_saving_what_was_loaded_gives_the_same_files(model, saved, tmp_path):
    type(model).from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


# -- one block ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("auto", [False, True])
def test_one_block_loads_with_the_other_files_gone(family, model, saved, block, auto):
    for other in {0, 1, 2} - {block}:
        (saved / f"block-{other:02d}.safetensors").unlink()
    loaded = (AutoModel if auto else type(model)).from_pretrained(saved, blocks=[block])
    assert loaded.resident_blocks == (block,)
    assert loaded.state_dict().keys() == {
        key for key in model.state_dict() if not key.startswith("blocks.") or key.startswith(f"blocks.{block}.")
    }
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert torch.equal(run(loaded, family, block), run(model, family, block))
    # Nothing else is held: the bytes are those of the block's and the shared file.
    index = serialization.read_index(saved / serialization.INDEX_NAME)["metadata"]["bytes"]
    own = index[f"block-{block:02d}.safetensors"] + index["shared.safetensors"]
    assert serialization.bytes_of(loaded.state_dict().values()) == own
    assert own < 0.5 * serialization.bytes_of(model.parameters())


def test_some_blocks_load_in_order_and_once(model, saved):
    loaded = type(model).from_pretrained(saved, blocks=[2, 0, 2])
    assert loaded.resident_blocks == (0, 2)
    with pytest.raises(ValueError, match=r"block 1 is not loaded: this model holds blocks \[0, 2\]"):
        loaded.block(1)


def test_a_block_alone_starts_from_the_weights_it_has_in_the_whole_model(family):
    config = family.build(3).config
    torch.manual_seed(7)
    whole = type(family.build(3))(config)
    for block in range(3):
        torch.manual_seed(7)
        alone = type(whole)(config, blocks=[block])
        assert serialization.same_tensors(dict(alone.block_parameters(block)), dict(whole.block_parameters(block)))
    first, second = (next(p for _, p in whole.block_parameters(b) if p.ndim > 1 and p.any()) for b in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("blocks", [[3], [-1], ["0"], [True], [], 1, "01"])
def test_blocks_that_cannot_be_loaded(model, saved, blocks):
    message = "does not exist: the model has blocks 0 to 2|must list at least one block"
    with as_users_run(), pytest.raises(ValueError, match=message):
        type(model).from_pretrained(saved, blocks=blocks)
    with as_users_run(), pytest.raises(ValueError, match=message):
        type(model)(model.config, blocks=blocks)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_gradients_reach_one_block_only(family, model, block):
    run(model, family, block).square().mean().backward()
    own = dict(model.block_parameters(block))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
    moved = [name for name, parameter in own.items() if parameter.grad.abs().max() > 0]
    assert len(moved) > 0.9 * len(own)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_computes_from_its_own_weights_alone(family, model, block):
    expected = run(model, family, block)
    with torch.no_grad():
        for other in {0, 1, 2} - {block}:
            for _, parameter in model.block_parameters(other):
                parameter.fill_(float("nan"))
    assert torch.equal(run(model, family, block), expected)


def test_block_and_shared_parameters_are_all_parameters_once(model):
    names = [n for b in range(3) for n, _ in model.block_parameters(b)] + [n for n, _ in model.shared_parameters()]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_the_table_of_parameters_adds_up(model, capsys):
    model.print_block_parameters()
    printed = capsys.readouterr().out
    assert printed.strip() == format_block_parameters(model).strip()
    counts = [int(line.split()[-2].replace(",", "")) for line in printed.strip().splitlines()[1:]]
    assert sum(counts[:-1]) == counts[-1] == sum(p.numel() for p in model.parameters())
    assert [line.split()[1] for line in printed.splitlines()[1:4]] == ["0-1", "2-3", "4-5"]


# -- the denoiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_denoiser_is_the_preconditioned_network(family, model, block):
    if not family.is_denoiser:
        pytest.skip("its estimate is the mean of the targets under its logits")
    sigma = torch.full((BATCH,), middle(model, block))
    z = family.noisy(float(sigma[0]))
    c = model.preconditioning(sigma)
    network = model.run_block(block, expand(c.c_in, z) * z, c.c_noise, **family.conditioning())
    expected = expand(c.c_skip, z) * z + expand(c.c_out, z) * network
    assert torch.equal(model.denoise(z, sigma, **family.conditioning()), expected)
    assert not torch.allclose(network, torch.zeros_like(network))


def test_a_noise_level_goes_to_the_block_that_owns_it(family, model):
    conditioning = family.conditioning()
    z = family.noisy(1.0)
    edges = model.partition.edges
    levels = {80.0: 0, edges[1]: 0, edges[1] * 0.999: 1, edges[2]: 1, edges[2] * 0.999: 2, 0.002: 2}
    for sigma, block in levels.items():
        routed = model.denoise(z, sigma, **conditioning)
        others = [model.denoise(z, sigma, block=b, **conditioning) for b in range(3)]
        assert [torch.equal(routed, other) for other in others] == [b == block for b in range(3)]


def test_noise_levels_may_differ_within_a_batch(family, model):
    low, high = model.partition.range(1)
    sigma = torch.linspace(low * 1.01, high * 0.99, BATCH)
    z, conditioning = family.noisy(0.3), family.conditioning()
    batched = model.denoise(z, sigma, **conditioning)
    single = [
        model.denoise(z[i : i + 1], float(sigma[i]), **{k: v[i : i + 1] for k, v in conditioning.items()})
        for i in range(BATCH)
    ]
    torch.testing.assert_close(batched, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_forward_gives_what_denoise_gives(family, model):
    if not family.is_denoiser:
        pytest.skip("it is called as transformers' models of its task are")
    z, conditioning = family.noisy(0.3), family.conditioning()
    expected = model.denoise(z, 0.3, **conditioning)
    output = model(z, 0.3, **conditioning)
    assert isinstance(output, DenoiserOutput) and torch.equal(output.sample, expected)
    assert torch.equal(model(z, 0.3, return_dict=False, **conditioning)[0], expected)
    assert torch.equal(model(z, torch.tensor(0.3), block=1, **conditioning).sample, expected)


@pytest.mark.parametrize(
    "sigma, message",
    [
        (torch.tensor([80.0, 80.0, 0.3, 0.01]), r"span blocks \[0, 1, 2\]: call denoise once per block"),
        (torch.ones(BATCH, 1), r"sigma has shape \[4, 1\]"),
        (torch.ones(BATCH - 1), r"sigma has shape \[3\]"),
        (float("nan"), "sigma=nan is outside"),
        (100.0, "sigma=100.0 is outside"),
        (0, "sigma=0.0 is outside"),
        (torch.tensor([0.3, 0.3, 0.3, -0.3]), "is outside the noise range"),
    ],
)
def test_noise_levels_that_are_refused(family, model, sigma, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(family.noisy(1.0), sigma, **family.conditioning())


@pytest.mark.parametrize("sigma", [float("nan"), 100.0, -1.0])
def test_naming_the_block_does_not_let_bad_noise_levels_through(family, model, sigma):
    with pytest.raises(ValueError, match="is outside the noise range"):
        model.denoise(family.noisy(1.0), sigma, block=0, **family.conditioning())


def test_blocks_that_do_not_exist_or_are_not_loaded(family, model):
    arguments = family.noisy(1.0), 1.0
    with pytest.raises(ValueError, match="block 3 does not exist: the model has blocks 0 to 2"):
        model.denoise(*arguments, block=3, **family.conditioning())
    with pytest.raises(ValueError, match=r"block 0 is not loaded: this model holds blocks \[1\]"):
        family.build(3, blocks=[1]).denoise(*arguments, **family.conditioning())


# -- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)])
def test_loading_in_another_dtype_casts_the_weights_and_keeps_the_estimate_in_float32(
    family, model, saved, dtype, tolerance
):
    loaded = type(model).from_pretrained(saved, dtype=dtype)
    assert loaded.dtype == dtype
    for key, value in loaded.named_parameters():
        assert value.dtype == dtype and torch.equal(value, model.state_dict()[key].to(dtype))
    for block in range(3):
        sigma = middle(model, block)
        output, expected = run(loaded, family, block), run(model, family, block)
        assert output.dtype == torch.float32
        # relative to the network's share c_out F of the estimate
        assert (output - expected).abs().max() < tolerance * min(sigma, 0.5) * 4


def test_float64_input_gives_a_float64_estimate(family, model):
    z, conditioning = family.noisy(0.3).double(), family.conditioning()
    double = model.double().denoise(z, 0.3, **conditioning)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), model.float().denoise(z.float(), 0.3, **conditioning))


def test_the_dtype_of_a_model_is_saved_with_it(family, tmp_path):
    model = family.build(3).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for blocks in (None, [1]):
        loaded = type(model).from_pretrained(tmp_path / "model", blocks=blocks)
        assert loaded.dtype == torch.bfloat16
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])


def test_autocast_leaves_the_estimate_in_float32(family, model):
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, family, 1)
    assert output.dtype == torch.float32 and not torch.equal(output, run(model, family, 1))
    torch.testing.assert_close(output, run(model, family, 1), rtol=0, atol=0.1)


def test_checkpointing_recomputes_and_changes_nothing(family, model):
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        run(model, family, 1).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.block_parameters(1)}

    calls = []
    handle = next(m for n, m in model.named_modules() if n.startswith("blocks.1.") and n.endswith(family.mlp))
    handle.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(calls) == 3  # once forward, once more backward
    assert serialization.same_tensors(plain, checkpointed)
    model.gradient_checkpointing_disable()
    assert serialization.same_tensors(plain, gradients()) and len(calls) == 4
