"""What every family of blocked models must do; the families are those of `battery.FAMILIES`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel

from battery import BATCH, FAMILIES, Family, middle, owners_of_levels
from battery import parametrize as pytest_generate_tests  # noqa: F401
from hf_diffusionblocks import serialization
from hf_diffusionblocks.modeling import BlockedPreTrainedModel, DenoiserOutput, format_block_parameters
from hf_diffusionblocks.preconditioning import expand
from hf_diffusionblocks.recipes.families import FAMILIES as OF_RECIPES
from tiny import as_users_run


@pytest.fixture
def model(family) -> BlockedPreTrainedModel:
    return family.build(family.num_blocks)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model: BlockedPreTrainedModel, family: Family, block: int) -> Tensor:
    sigma = middle(model, block)
    return model.denoise(family.noisy(sigma), sigma, **family.conditioning())


def assert_same(a: BlockedPreTrainedModel, b: BlockedPreTrainedModel) -> None:
    """Bitwise equal weights and buffers, persistent or not."""
    assert serialization.same_tensors(a.state_dict(), b.state_dict())
    assert serialization.same_tensors(dict(a.named_buffers()), dict(b.named_buffers()))


def blocks_of(model: BlockedPreTrainedModel) -> range:
    return range(model.partition.num_blocks)


def test_every_family_of_the_recipes_is_in_the_battery():
    kinds = {family.build(family.num_blocks).config.model_type for family in FAMILIES.values()}
    assert kinds == {family.model_type for family in OF_RECIPES.values()}
    assert {name: f.recipe[0] for name, f in FAMILIES.items() if f.recipe}.keys() == OF_RECIPES.keys()


# -- files -------------------------------------------------------------------------------------------------------


def test_the_files_are_config_shared_blocks_and_index(model, saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        *(f"block-{block:02d}.safetensors" for block in blocks_of(model)),
        "config.json",
        *(["generation_config.json"] if model.can_generate() else []),
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
    for block in blocks_of(model):
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
    for block in blocks_of(model):
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


@pytest.mark.parametrize("auto", [False, True])
def test_one_block_loads_with_the_other_files_gone(family, model, saved, block, auto):
    for other in {*blocks_of(model)} - {block}:
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


def test_one_block_is_a_small_part_of_the_model(family, model, block):
    alone = family.build(family.num_blocks, blocks=[block])
    assert serialization.bytes_of(alone.parameters()) < 0.5 * serialization.bytes_of(model.parameters())


def test_some_blocks_load_in_order_and_once(family, model, saved):
    loaded = type(model).from_pretrained(saved, blocks=[2, 0, 2])
    assert loaded.resident_blocks == (0, 2)
    with pytest.raises(ValueError, match=r"block 1 is not loaded: this model holds blocks \[0, 2\]"):
        loaded.block(1)


def test_a_block_alone_starts_from_the_weights_it_has_in_the_whole_model(family):
    made = family.build(family.num_blocks)
    torch.manual_seed(7)
    whole = type(made)(made.config)
    for block in blocks_of(whole):
        torch.manual_seed(7)
        alone = type(whole)(made.config, blocks=[block])
        assert serialization.same_tensors(dict(alone.block_parameters(block)), dict(whole.block_parameters(block)))


def test_blocks_start_unequal(family):
    made = family.build(family.num_blocks)
    whole = type(made)(made.config)
    first, second = (next(p for _, p in whole.block_parameters(b) if p.ndim > 1 and p.any()) for b in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("blocks", [["B"], [-1], ["0"], [True], [], 1, "01"])
def test_blocks_that_cannot_be_loaded(family, model, saved, blocks):
    blocks = [family.num_blocks] if blocks == ["B"] else blocks
    message = f"does not exist: the model has blocks 0 to {family.last}|must list at least one block"
    with as_users_run(), pytest.raises(ValueError, match=message):
        type(model).from_pretrained(saved, blocks=blocks)
    with as_users_run(), pytest.raises(ValueError, match=message):
        type(model)(model.config, blocks=blocks)


def test_gradients_reach_one_block_only(family, model, block):
    run(model, family, block).square().mean().backward()
    own, shared = dict(model.block_parameters(block)), dict(model.shared_parameters())
    for name, parameter in model.named_parameters():
        assert name in shared or (parameter.grad is not None) == (name in own), name
    moved = [name for name, parameter in own.items() if parameter.grad.abs().max() > 0]
    assert len(moved) > 0.9 * len(own)


def test_a_block_computes_from_its_own_weights_alone(family, model, block):
    expected = run(model, family, block)
    with torch.no_grad():
        for other in {*blocks_of(model)} - {block}:
            for _, parameter in model.block_parameters(other):
                parameter.fill_(float("nan"))
    assert torch.equal(run(model, family, block), expected)


def test_block_and_shared_parameters_are_all_parameters_once(model):
    names = [n for b in blocks_of(model) for n, _ in model.block_parameters(b)] + [
        n for n, _ in model.shared_parameters()
    ]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_the_table_of_parameters_adds_up(model, capsys):
    model.print_block_parameters()
    printed = capsys.readouterr().out
    assert printed.strip() == format_block_parameters(model).strip()
    counts = [int(line.split()[-2].replace(",", "")) for line in printed.strip().splitlines()[1:]]
    assert sum(counts[:-1]) == counts[-1] == sum(p.numel() for p in model.parameters())
    layers = [model.partition.layers(block) for block in blocks_of(model)]
    spans = [line.split()[1] for line in printed.splitlines()[1 : 1 + len(layers)]]
    assert spans == [f"{own[0]}-{own[-1]}" for own in layers]


# -- the denoiser ------------------------------------------------------------------------------------------------


def test_the_denoiser_is_the_preconditioned_network(family, model, block):
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
    for sigma, block in owners_of_levels(model).items():
        routed = model.denoise(z, sigma, **conditioning)
        others = [model.denoise(z, sigma, block=b, **conditioning) for b in blocks_of(model)]
        assert [torch.equal(routed, other) for other in others] == [b == block for b in blocks_of(model)]


def test_noise_levels_may_differ_within_a_batch(family, model):
    low, high = model.partition.range(min(1, family.last))
    sigma = torch.linspace(low * 1.01, high * 0.99, BATCH)
    z, conditioning = family.noisy(0.3), family.conditioning()
    batched = model.denoise(z, sigma, **conditioning)
    single = [
        model.denoise(z[i : i + 1], float(sigma[i]), **{k: v[i : i + 1] for k, v in conditioning.items()})
        for i in range(BATCH)
    ]
    torch.testing.assert_close(batched, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_forward_gives_what_denoise_gives(family, model):
    z, conditioning = family.noisy(0.3), family.conditioning()
    expected = model.denoise(z, 0.3, **conditioning)
    output = model(z, 0.3, **conditioning)
    assert isinstance(output, DenoiserOutput) and torch.equal(output.sample, expected)
    assert torch.equal(model(z, 0.3, return_dict=False, **conditioning)[0], expected)
    assert torch.equal(model(z, torch.tensor(0.3), block=1, **conditioning).sample, expected)


def test_levels_that_span_blocks_are_refused(family, model):
    sigma = torch.tensor([middle(model, 0), middle(model, 0), middle(model, 1), middle(model, 2)])
    with pytest.raises(ValueError, match=r"span blocks \[0, 1, 2\]: call denoise once per block"):
        model.denoise(family.noisy(1.0), sigma, **family.conditioning())


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH - 1,)], ids=str)
def test_levels_of_another_shape_are_refused(family, model, shape):
    with pytest.raises(ValueError, match=rf"sigma has shape \[{', '.join(map(str, shape))}\]"):
        model.denoise(family.noisy(1.0), torch.full(shape, middle(model, 0)), **family.conditioning())


@pytest.mark.parametrize("kind", ["nan", "above", "below", "one of many"])
@pytest.mark.parametrize("named", [False, True], ids=["routed", "named"])
def test_levels_outside_the_noise_range_are_refused_also_where_the_block_is_named(family, model, kind, named):
    above, below = family.outside(model)
    good = middle(model, 0)
    sigma = {
        "nan": float("nan"),
        "above": above,
        "below": below,
        "one of many": torch.tensor([good, good, good, below]),
    }
    block = {"block": 0} if named else {}
    with pytest.raises(ValueError, match="is outside the noise range"):
        model.denoise(family.noisy(1.0), sigma[kind], **block, **family.conditioning())


def test_a_block_that_does_not_exist_is_refused(family, model):
    message = f"block {family.num_blocks} does not exist: the model has blocks 0 to {family.last}"
    with pytest.raises(ValueError, match=message):
        model.denoise(family.noisy(1.0), middle(model, 0), block=family.num_blocks, **family.conditioning())


def test_a_block_that_is_not_loaded_is_refused(family, model):
    with pytest.raises(ValueError, match=r"block 0 is not loaded: this model holds blocks \[1\]"):
        alone = family.build(family.num_blocks, blocks=[1])
        alone.denoise(family.noisy(1.0), middle(model, 0), **family.conditioning())


# -- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)])
def test_loading_in_another_dtype_casts_the_weights_and_keeps_the_estimate_in_float32(
    family, model, saved, dtype, tolerance
):
    loaded = type(model).from_pretrained(saved, dtype=dtype)
    assert loaded.dtype == dtype
    for key, value in loaded.named_parameters():
        assert value.dtype == dtype and torch.equal(value, model.state_dict()[key].to(dtype))
    for block in blocks_of(model):
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
    model = family.build(family.num_blocks).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for blocks in (None, [family.last]):
        loaded = type(model).from_pretrained(tmp_path / "model", blocks=blocks)
        assert loaded.dtype == torch.bfloat16
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])


def test_autocast_leaves_the_estimate_in_float32(family, model):
    block = min(1, family.last)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, family, block)
    expected = run(model, family, block)
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=0, atol=0.1)


def test_checkpointing_recomputes_and_changes_nothing(family, model):
    block = min(1, family.last)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        run(model, family, block).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.block_parameters(block) if p.grad is not None}

    calls, own = [], f"blocks.{block}."
    handle = next(m for n, m in model.named_modules() if n.startswith(own) and n.endswith(family.mlp))
    handle.register_forward_pre_hook(lambda *_: calls.append(1))  # on entry: recomputing ends inside the last part
    model.train()
    plain = gradients()
    once = len(calls)
    assert once in (1, 2)  # of one stream, or of two
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(calls) == 3 * once  # once forward, once more backward
    assert serialization.same_tensors(plain, checkpointed)
    model.gradient_checkpointing_disable()
    assert serialization.same_tensors(plain, gradients()) and len(calls) == 4 * once
