"""RandAugment: every operation is PIL's in every pixel, draws are even and follow the generator alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from transformers import TrainerCallback

from devices import ON_CPU
from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.augmentation import OPERATIONS, RandAugment
from hf_diffusionblocks.objectives import LabelPrediction
from hf_diffusionblocks.serialization import same_tensors
from tiny import TinyImages, tiny_dit
from tiny_vit import new_vit

SIGNED = ["shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast", "sharpness"]
ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def pictures(channels: int, height: int = 12, width: int = 16) -> Tensor:
    """Noise, a gradient, a dark one, one of a few values, one of one value."""
    noise = torch.randint(256, (channels, height, width), generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(20, 190, width).round().long().expand(channels, height, width)
    many = [noise, ramp, noise // 4, noise // 100 * 60 + 40, torch.full_like(noise, 77)]
    return torch.stack(many).to(torch.uint8)


def expected(name: str, image: Image.Image, m: float, sign: float) -> Image.Image:
    """What torchvision's RandAugment does to a PIL image: its strengths and signs, PIL's operations."""

    def moved(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    width, height = image.size
    if name == "identity":
        return image
    if name == "shear_x":
        return moved(1, sign * 0.3 * m, 0, 0, 1, 0)
    if name == "shear_y":
        return moved(1, 0, 0, sign * 0.3 * m, 1, 0)
    if name == "translate_x":
        return moved(1, 0, -int(sign * 150 / 331 * width * m), 0, 1, 0)
    if name == "translate_y":
        return moved(1, 0, 0, 0, 1, -int(sign * 150 / 331 * height * m))
    if name == "rotate":
        return image.rotate(sign * 30 * m, Image.Resampling.NEAREST)
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(1 + sign * 0.9 * m)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * m))
    if name == "solarize":
        return ImageOps.solarize(image, 255 * (1 - m))
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}[name](image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 16), (32, 32)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pils_in_every_pixel(name, size, channels):
    images = pictures(channels, *size)
    for magnitude in (0, 9, 17, 30):
        for sign in (1.0, -1.0):
            found = OPERATIONS[name](images.clone(), magnitude / 30, sign)
            assert found.dtype == torch.uint8 and found.shape == images.shape
            for row, image in zip(found, images, strict=True):
                pil = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy(), "RGB" if channels == 3 else "L")
                wanted = np.array(expected(name, pil, magnitude / 30, sign)).reshape(*size, channels)
                np.testing.assert_array_equal(row.permute(1, 2, 0).numpy(), wanted)


def test_operations_are_drawn_evenly_and_signs_too():
    chosen, signs = RandAugment().draw(14_000, torch.Generator().manual_seed(0))
    assert chosen.shape == signs.shape == (14_000, 2)
    counts = torch.bincount(chosen.flatten(), minlength=len(OPERATIONS))
    assert len(counts) == len(OPERATIONS) == 14
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert abs(float(signs.mean())) < 0.03 and set(signs.unique().tolist()) == {-1.0, 1.0}


def test_each_image_passes_its_own_operations_in_turn():
    images = pictures(3)[[0, 1, 2, 3] * 10]
    scaled = images.float() / 127.5 - 1
    found = RandAugment()(scaled, torch.Generator().manual_seed(3))
    chosen, signs = RandAugment().draw(len(images), torch.Generator().manual_seed(3))
    names = list(OPERATIONS)
    for row in range(len(images)):
        one = images[row : row + 1]
        for index, sign in zip(chosen[row], signs[row], strict=True):
            one = OPERATIONS[names[index]](one, 0.3, float(sign))
        torch.testing.assert_close(found[row], one[0].float() / 127.5 - 1, rtol=0, atol=0)
    assert (found != scaled).flatten(1).any(1).float().mean() > 0.7


def test_no_operations_leave_pixels_as_they_are_to_the_last_bit():
    scaled = pictures(3).float().div_(127.5).sub_(1.0)
    assert torch.equal(RandAugment(num_ops=0)(scaled), scaled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ops": -1}, "num_ops=-1 must be a whole number of at least 0"),
        ({"magnitude": 31}, "magnitude=31 must be a whole number from 0 to 30"),
        ({"magnitude": 1.5}, "magnitude=1.5"),
        ({"num_magnitude_bins": 1}, "num_magnitude_bins=1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**settings)


def test_images_that_are_neither_grey_nor_rgb_are_refused():
    with pytest.raises(ValueError, match="images have 4 channels"):
        RandAugment()(torch.zeros(2, 4, 8, 8))


# -- in training -------------------------------------------------------------------------------------------------


def classifier(**settings):
    return new_vit(3, perturbation=0.05, **settings)


def trainer_of(model, folder, dataset=None, **settings) -> DiffusionBlocksTrainer:
    given = {"max_steps": 3, "per_device_train_batch_size": 8, "disable_tqdm": True, "cpu": ON_CPU, "save_steps": 4}
    args = DiffusionBlocksTrainingArguments(output_dir=str(folder), **given | settings)
    return DiffusionBlocksTrainer(model, args, dataset or TinyImages(32))


def test_the_objective_changes_images_from_the_blocks_own_stream_after_the_flips():
    batch = TinyImages(8)[list(range(8))]
    for flips in (False, True):
        prepared = LabelPrediction(horizontal_flip=flips, rand_augment=True).prepare(batch, seeded(4))
        generator = seeded(4)
        flipped = LabelPrediction(horizontal_flip=flips).prepare(batch, generator)["pixel_values"]
        assert torch.equal(prepared["pixel_values"], RandAugment()(flipped, generator))
        assert not torch.equal(prepared["pixel_values"], flipped)
    assert torch.equal(LabelPrediction().prepare(batch, seeded(4))["pixel_values"], batch["pixel_values"])
    with pytest.raises(ValueError, match="rand_augment=True with hidden_states"):
        LabelPrediction(rand_augment=True).prepare(batch | {"hidden_states": torch.zeros(8, 17, 16)}, seeded(4))


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    given = {"rand_augment": True, "horizontal_flip": True}
    whole = trainer_of(classifier(preset="paper"), tmp_path / "whole", **given)
    whole.train()
    plain = trainer_of(classifier(preset="paper"), tmp_path / "plain", horizontal_flip=True)
    plain.train()
    for stop in (5, None):
        part = trainer_of(classifier(preset="paper"), tmp_path / "part", **given)
        if stop:
            part.callbacks.append(StopAfter(stop))
        part.train(resume_from_checkpoint=True)
    assert same_tensors(part.model.state_dict(), whole.model.state_dict())
    assert not same_tensors(plain.model.state_dict(), whole.model.state_dict())


def test_it_is_for_classifiers_with_outputs_that_are_made_anew(tmp_path):
    with pytest.raises(ValueError, match="rand_augment=True has no meaning for blocked_dit"):
        trainer_of(tiny_dit(3), tmp_path, rand_augment=True)
    with pytest.raises(ValueError, match="lower_outputs='disk' with rand_augment=True"):
        trainer_of(classifier(), tmp_path, rand_augment=True, lower_outputs="disk")


def test_a_checkpoint_from_before_this_setting_can_be_resumed(tmp_path):
    assert "rand_augment" not in trainer_of(classifier(), tmp_path / "a").identity["settings"]
    assert trainer_of(classifier(), tmp_path / "b", rand_augment=True).identity["settings"]["rand_augment"]


class StopAfter(TrainerCallback):
    def __init__(self, iterations: int):
        self.iterations = iterations

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.iterations


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
