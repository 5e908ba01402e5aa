"""Loading labelled images: every source, exact pixels, latents on disk, and each error."""

import gzip
import json
import struct

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from hf_diffusionblocks.data import ImageDataset, cache_latents, image_tables, load_image_dataset
from hf_diffusionblocks.data.indexing import fixed_subset
from tiny import tiny_vae

NAMES = ["cat", "dog", "owl"]


def pictures(n: int = 6, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Random uint8 images [n, height, width, channels], without the last axis for one channel."""
    images = np.random.default_rng(n).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    return images[..., 0] if channels == 1 else images


def hub_dataset(images, labels=None, **columns) -> datasets.Dataset:
    """A ``datasets.Dataset`` with PNG images (lossless) and class labels."""
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    features.update({name: datasets.Value("int64") for name in columns})
    rows = {"image": [Image.fromarray(i) for i in images], "label": labels, **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)


def write_idx(path, images: np.ndarray, labels: np.ndarray, prefix: str = "train", compress: bool = True) -> None:
    path.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        name = f"{prefix}-{kind}-ubyte" + (".gz" if compress else "")
        (path / name).write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae()


@pytest.fixture
def images() -> ImageDataset:
    return ImageDataset(as_tensor(pictures(10)), [i % 3 for i in range(10)], NAMES)


# Indexing


def test_pixels_span_minus_one_to_one():
    ds = ImageDataset(torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1), [0, 1, 2])
    batch = ds[[2, 0, 1]]
    assert batch["pixel_values"].flatten().tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].shape == (3, 1, 1, 1)
    assert batch["class_labels"].tolist() == [2, 0, 1] and batch["class_labels"].dtype == torch.int64


@given(rows=st.lists(st.integers(-10, 9), min_size=1, max_size=12))
def test_a_batch_is_its_rows_stacked(rows):
    ds = ImageDataset(as_tensor(pictures(10)), range(10))
    single = [ds[i] for i in rows]
    for index in (rows, np.array(rows), torch.tensor(rows)):
        for key, value in ds[index].items():
            torch.testing.assert_close(value, torch.stack([s[key] for s in single]), rtol=0, atol=0)


def test_slices_masks_and_scalar_tensors_index_too(images):
    assert images[2:4]["class_labels"].tolist() == [2, 0]
    assert images[torch.arange(10) == 5]["class_labels"].tolist() == [2]
    assert images[torch.tensor(4)]["pixel_values"].shape == (3, 8, 8) == images[np.int64(4)]["pixel_values"].shape
    with pytest.raises(IndexError):
        images[[10]]
    with pytest.raises(ValueError, match="must be integers"):
        images[[0.5]]


def test_iteration_ends_and_the_default_collator_batches(images):
    assert len(list(images)) == 10
    batch = next(iter(DataLoader(images, batch_size=4)))
    torch.testing.assert_close(batch["pixel_values"], images[0:4]["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("index", [1, slice(0, 3), [0, 1]])
def test_work_on_a_batch_in_place_leaves_the_data_alone(dtype, index):
    ds = ImageDataset(torch.ones(4, 1, 2, 2, dtype=dtype), [0, 1, 0, 1])
    before = ds.images.clone(), ds.labels.clone()
    batch = ds[index]
    batch["pixel_values"].add_(5)
    batch["class_labels"].add_(5)
    assert torch.equal(ds.images, before[0]) and torch.equal(ds.labels, before[1])


def test_select_keeps_order_and_classes(images):
    part = images.select([7, 1])
    assert torch.equal(part.images, images.images[[7, 1]]) and part.labels.tolist() == [1, 1]
    assert part.class_names == NAMES and part.num_classes == 3


def test_fingerprint_follows_the_content(images):
    same = ImageDataset(images.images.clone(), images.labels.clone(), NAMES)
    other = ImageDataset(images.images.clone(), images.labels.flip(0), NAMES)
    renamed = ImageDataset(images.images, images.labels, ["a", "b", "c"])
    assert images.fingerprint == same.fingerprint and len(images.fingerprint) == 16
    assert len({images.fingerprint, other.fingerprint, renamed.fingerprint}) == 3


def test_latents_are_scaled_as_they_are_read():
    latents = torch.randn(3, 4, 2, 2).half()
    ds = ImageDataset(latents, [0, 0, 1], scaling_factor=0.5)
    torch.testing.assert_close(ds[[0, 2]]["pixel_values"], latents[[0, 2]].float() * 0.5)
    assert ds.is_latent and ds.channels == 4 and ds.image_size == 2 and ds.class_names == ["0", "1"]


# Digits and IDX files


def test_digits_are_split_once_without_overlap_and_by_class():
    train, test = load_image_dataset("digits"), load_image_dataset("digits", "test")
    assert (len(train), len(test), train.channels, train.image_size, train.num_classes) == (1437, 360, 1, 8, 10)
    # Together they are every digit exactly once: nothing is in both, nothing is lost.
    both = torch.cat([train.images, test.images]).flatten(1).double() * 16 / 255
    everything = np.sort([row.tobytes() for row in load_digits().images.reshape(1797, -1).astype(np.uint8)])
    assert np.array_equal(np.sort([row.tobytes() for row in both.round().byte().numpy()]), everything)
    total = torch.cat([train.labels, test.labels]).bincount()
    assert ((test.labels.bincount() - total / 5).abs() < 1).all()
    assert train[:]["pixel_values"].min() == -1 and train[:]["pixel_values"].max() == 1
    # Figures on the test split compare only while the split stays as it is.
    assert train.fingerprint == "90e5055d074d2077"


def test_arrays_are_resized_and_turned_to_rgb():
    ds = load_image_dataset("digits", "test", image_size=16, channels=3)
    assert ds.images.shape == (360, 3, 16, 16) and torch.equal(ds.images[:, 0], ds.images[:, 2])


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path, compress):
    train, test = pictures(5, channels=1), pictures(4, channels=1)
    write_idx(tmp_path, train, np.arange(5, dtype=np.uint8), compress=compress)
    write_idx(tmp_path, test, np.arange(4, dtype=np.uint8), "t10k", compress)
    ds = load_image_dataset(tmp_path, "test")
    assert torch.equal(ds.images, as_tensor(test)) and ds.labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(load_image_dataset(str(tmp_path)).images, as_tensor(train))


def test_fashion_mnist_is_found_by_argument_and_by_environment(tmp_path, monkeypatch):
    write_idx(tmp_path, pictures(5, 28, 28, 1), np.array([9, 0, 0, 1, 2], dtype=np.uint8))
    by_argument = load_image_dataset("fashion-mnist", data_dir=tmp_path)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    by_environment = load_image_dataset("fashion-mnist")
    assert by_argument.fingerprint == by_environment.fingerprint
    assert by_argument.image_size == 28 and by_argument.class_names[9] == "Ankle boot"


def test_fashion_mnist_missing_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist.*zalando-datasets/fashion_mnist"):
        load_image_dataset("fashion-mnist", data_dir=tmp_path)


def test_damaged_idx_files_are_named(tmp_path):
    images, labels = pictures(5, channels=1), np.arange(5, dtype=np.uint8)
    write_idx(tmp_path, images, labels)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    content = gzip.decompress(whole)
    truncated = [whole[:-40], gzip.compress(content[:-1]), gzip.compress(content[:3]), b""]
    for damaged in [*truncated, b"not gzip at all", gzip.compress(b"\0\0\x0d" + content[3:])]:
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is truncated or not an IDX file"):
            load_image_dataset(tmp_path)
    write_idx(tmp_path, images, labels[:4])
    with pytest.raises(ValueError, match="5 images but 4 labels"):
        load_image_dataset(tmp_path)


# What `datasets` reads


def test_parquet_file_gives_the_exact_pixels(tmp_path):
    raw = pictures()
    hub_dataset(raw).to_parquet(tmp_path / "some.parquet")
    ds = load_image_dataset(tmp_path / "some.parquet")
    assert torch.equal(ds.images, as_tensor(raw)) and ds.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert ds.class_names == NAMES and ds.channels == 3


def test_directory_of_parquet_splits(tmp_path):
    hub_dataset(pictures(6)).to_parquet(tmp_path / "train.parquet")
    hub_dataset(pictures(4)).to_parquet(tmp_path / "test.parquet")
    assert len(load_image_dataset(tmp_path)) == 6
    assert torch.equal(load_image_dataset(tmp_path, "test").images, as_tensor(pictures(4)))
    assert len(load_image_dataset(tmp_path, "train[:50%]")) == 3
    files = {"train": str(tmp_path / "test.parquet")}
    assert len(load_image_dataset("parquet", data_files=files)) == 4
    with pytest.raises(ValueError, match="val.*train.*test"):
        load_image_dataset(tmp_path, "val")


def test_parquet_without_hugging_face_types(tmp_path):
    raw = pictures(3, channels=1)
    for i, image in enumerate(raw):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    content = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    plain = datasets.Dataset.from_dict({"img": content, "labels": [0, 2, 4], "id": [7, 8, 9]})
    ds = load_image_dataset(plain)
    assert torch.equal(ds.images, as_tensor(raw)) and ds.class_names == ["0", "1", "2", "3", "4"]
    paths = datasets.Dataset.from_dict({"file": [str(tmp_path / f"{i}.png") for i in range(3)], "n": [0, 1, 2]})
    assert torch.equal(load_image_dataset(paths, image_column="file", label_column="n").images, ds.images)
    arrays = datasets.Dataset.from_dict({"image": raw.tolist(), "label": [0, 1, 2]})
    assert torch.equal(load_image_dataset(arrays).images, ds.images)


def test_image_folder(tmp_path):
    raw = pictures(4)
    for i, (split, name) in enumerate([("train", "owl"), ("train", "cat"), ("test", "cat"), ("test", "owl")]):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(raw[i]).save(tmp_path / split / name / f"{i}.png")
    train, test = load_image_dataset(tmp_path), load_image_dataset("imagefolder", "test", data_dir=tmp_path)
    assert train.class_names == ["cat", "owl"] == test.class_names
    assert torch.equal(train.images[train.labels == 1], as_tensor(raw[:1]))
    assert sorted(test.labels.tolist()) == [0, 1]


def test_saved_datasets_and_dataset_dicts(tmp_path):
    both = datasets.DatasetDict(train=hub_dataset(pictures(6)), test=hub_dataset(pictures(4)))
    both.save_to_disk(tmp_path / "both")
    expected = as_tensor(pictures(4))
    for source in (both, both["test"], tmp_path / "both"):
        assert torch.equal(load_image_dataset(source, "test").images, expected)
    with pytest.raises(ValueError, match="unknown split 'tests'.*did you mean 'test'"):
        load_image_dataset(both, "tests")


def test_streaming_reads_the_first_rows(tmp_path):
    raw = pictures()
    hub_dataset(raw).to_parquet(tmp_path / "some.parquet")
    ds = load_image_dataset(tmp_path / "some.parquet", streaming=True, max_samples=4)
    assert torch.equal(ds.images, as_tensor(raw[:4])) and ds.class_names == NAMES
    assert len(load_image_dataset(hub_dataset(raw).to_iterable_dataset())) == 6


def test_a_subset_of_sorted_classes_keeps_all_of_them():
    labels = [0] * 40 + [1] * 40 + [2] * 40
    source = hub_dataset(pictures(120, 2, 2), labels)
    small, large = (load_image_dataset(source, max_samples=n) for n in (24, 60))
    assert len(small) == 24 and set(small.labels.tolist()) == {0, 1, 2}
    assert {i.numpy().tobytes() for i in small.images} <= {i.numpy().tobytes() for i in large.images}
    assert len(load_image_dataset(source, max_samples=1000)) == 120
    unnamed = datasets.Dataset.from_dict({"image": [b.tolist() for b in pictures(9, 2, 2)], "label": list(range(9))})
    assert load_image_dataset(unnamed, max_samples=2).num_classes == 9


def test_columns_are_found_by_type_or_named(tmp_path):
    source = hub_dataset(pictures(), size=[5] * 6).rename_columns({"image": "picture", "label": "animal"})
    assert load_image_dataset(source).class_names == NAMES
    assert load_image_dataset(source, label_column="size").labels.tolist() == [5] * 6
    with pytest.raises(ValueError, match="image column 'pictures': did you mean 'picture'.*animal, picture, size"):
        load_image_dataset(source, image_column="pictures")
    with pytest.raises(ValueError, match="no label column among the columns picture, size: .*label_column="):
        load_image_dataset(source.remove_columns("animal"))
    with pytest.raises(ValueError, match="several label columns, animal, coarse,"):
        load_image_dataset(source.add_column("coarse", [0] * 6).cast_column("coarse", datasets.ClassLabel(names=NAMES)))


def test_resizing_crops_the_centre_and_filters_as_pil_does():
    raw = pictures(3, 40, 64)
    ds = load_image_dataset(hub_dataset(raw), image_size=16)
    for image, ours in zip(raw, ds.images, strict=True):
        theirs = Image.fromarray(image[:, 12:52]).resize((16, 16), Image.Resampling.BICUBIC)
        assert (as_tensor(np.array(theirs)[None])[0].int() - ours.int()).abs().max() <= 1
    tall = load_image_dataset(hub_dataset(raw.transpose(0, 2, 1, 3)), image_size=16)
    assert (tall.images.transpose(2, 3).int() - ds.images.int()).abs().max() <= 1
    mixed = [raw[0], raw[1][:, :50], raw[2][:24]]
    assert load_image_dataset(hub_dataset(mixed), image_size=16).images.shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="40x64 .* not square"):
        _ = load_image_dataset(hub_dataset(raw)).image_size


def test_channels_are_converted_and_grey_images_join_coloured_ones():
    colour, grey = pictures(2), pictures(2, channels=1)
    assert load_image_dataset(hub_dataset(grey), channels=3).channels == 3
    luminance = np.stack([np.array(Image.fromarray(i).convert("L")) for i in colour])
    assert torch.equal(load_image_dataset(hub_dataset(colour), channels=1).images, as_tensor(luminance))
    assert load_image_dataset(hub_dataset([colour[0], grey[0]])).channels == 3
    with pytest.raises(ValueError, match="row 1 .*mode RGB but the first image is grey; give channels=1 or channels=3"):
        load_image_dataset(hub_dataset([grey[0], colour[0]]))


def test_decoded_images_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tables, "CACHE_MIN_IMAGES", 5)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    decoded, decode = [], image_tables.decode_cell
    monkeypatch.setattr(image_tables, "decode_cell", lambda *args, **kw: decoded.append(args[1]) or decode(*args, **kw))
    source = hub_dataset(pictures(6))
    first = load_image_dataset(source)
    again = load_image_dataset(source)
    assert len(decoded) == 6 and first.fingerprint == again.fingerprint
    assert load_image_dataset(source, image_size=4).image_size == 4 and len(decoded) == 12
    files = list((tmp_path / "hf_diffusionblocks").iterdir())
    assert len(files) == 2  # one for each size, and nothing half written
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    assert load_image_dataset(source).fingerprint == first.fingerprint and len(decoded) == 18
    load_image_dataset(hub_dataset(pictures(5)))
    assert len(list((tmp_path / "hf_diffusionblocks").iterdir())) == 2  # small sets are not kept


def test_cifar10(shared_data):
    path = shared_data / "cifar10" / "test.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    ds = load_image_dataset(path, max_samples=200)
    assert ds.images.shape == (200, 3, 32, 32) and ds.num_classes == 10 and ds.class_names[0] == "airplane"
    assert ds.labels.bincount(minlength=10).min() > 5
    source = datasets.load_dataset("parquet", data_files=str(path), split="train")
    row = fixed_subset(10_000, 200)[17]
    assert np.array_equal(np.array(source[int(row)]["image"]), ds.images[17].permute(1, 2, 0))
    assert source[int(row)]["label"] == ds.labels[17]


# Bad input


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 2, 2).byte(), [], "is empty"),
        (torch.zeros(2, 2, 2).byte(), [0, 1], r"expected \[N, C, H, W\]"),
        (torch.zeros(2, 1, 2, 2).int(), [0, 1], "torch.int32"),
        (torch.zeros(2, 1, 2, 2).byte(), [0], "2 images but 1 labels"),
        (torch.zeros(2, 1, 2, 2).byte(), [0, -1], "row 1, -1, is negative"),
        (torch.zeros(2, 1, 2, 2).byte(), [0, 0.5], "row 1, 0.5, is not an integer"),
        (torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2), "row 0, 0.0, is not an integer"),
        (torch.zeros(2, 1, 2, 2).byte(), ["cat", "dog"], "row 0, 'cat', is not an integer.*class_encode_column"),
        (torch.zeros(2, 1, 2, 2).byte(), [0, None], "row 1, None, is not an integer"),
        (torch.zeros(2, 1, 2, 2).byte(), [0, 3], r"label 3 of row 1 is not in \[0, 3\)"),
        (torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1), [0, 1], "latent of row 1 is not finite"),
    ],
)
def test_bad_arrays(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, labels, NAMES)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("digit", {}, "unknown data set 'digit': did you mean 'digits'"),
        ("./no/such/folder", {}, "unknown data set './no/such/folder'.*no path on this machine"),
        (__file__, {}, "must be .parquet or .arrow"),
        (3, {}, "int is no data set"),
        ("digits", {"split": "tests"}, "unknown split 'tests': did you mean 'test'"),
        ("digits", {"image_size": 0}, "image_size=0 must be a positive integer"),
        ("digits", {"max_samples": 2.5}, "max_samples=2.5 must be a positive integer"),
        ("digits", {"channels": 2}, "channels=2 .*use 1 .grey. or 3"),
        ("digits", {"streaming": True, "revision": "main"}, "streaming, revision: no setting for 'digits'"),
        (hub_dataset(pictures(2)), {"imagesize": 4}, "imagesize: no setting for a Dataset"),
        ("digits", {"scaling_factor": 0.5}, "scaling_factor=0.5 applies to latents"),
    ],
)
def test_bad_settings(source, settings, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(source, **settings)


def test_bad_rows_are_named(tmp_path):
    raw = pictures(4)
    with pytest.raises(ValueError, match="row 2 is 8x5 .height x width., that of row 0 is 8x8: give image_size="):
        load_image_dataset(hub_dataset([raw[0], raw[1], raw[2][:, :5]]))
    with pytest.raises(ValueError, match="row 1, -1, is negative"):
        load_image_dataset(hub_dataset(raw[:2], [0, -1]))
    many = [[[0]] * 2] * 98 + [[[0]], [[0]] * 2]  # row 98 differs; the subset of 50 holds it, at another place
    assert fixed_subset(100, 50)[-1] == 98
    with pytest.raises(ValueError, match="row 98 is 1x1"):
        load_image_dataset(datasets.Dataset.from_dict({"image": many, "label": [0] * 100}), max_samples=50)
    with pytest.raises(ValueError, match="is empty"):
        load_image_dataset(hub_dataset(raw).select([]))
    file = tmp_path / "broken.png"
    Image.fromarray(raw[0]).save(file)
    file.write_bytes(file.read_bytes()[:60])
    broken = {"image": [str(file)], "label": [0]}
    with pytest.raises(ValueError, match="image of row 0 .*broken.png. cannot be read"):
        load_image_dataset(datasets.Dataset.from_dict(broken).cast_column("image", datasets.Image()))
    with pytest.raises(ValueError, match="row 1 cannot be read: the cell is empty"):
        load_image_dataset(datasets.Dataset.from_dict({"image": [raw[0].tolist(), None], "label": [0, 1]}))
    with pytest.raises(ValueError, match="row 98 cannot be read"):
        rows = {"image": [[[0]]] * 98 + [None, [[0]]], "label": [0] * 100}
        load_image_dataset(datasets.Dataset.from_dict(rows), max_samples=50)
    deep = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match="row 0 .*more than 8 bits"):
        load_image_dataset(hub_dataset([np.array(deep)]))


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but nothing else")
    with pytest.raises(ValueError, match="bad.parquet .split .train.. cannot be read by `datasets`"):
        load_image_dataset(tmp_path / "bad.parquet")


# Latents


def test_cached_latents_are_the_encoder_s_and_read_back(tmp_path, images, vae):
    cache_latents(images, vae, tmp_path, batch_size=4, posterior="mode", shard_size=6)
    ds = load_image_dataset(tmp_path)
    with torch.no_grad():
        expected = vae.encode(images[:]["pixel_values"]).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(ds[:]["pixel_values"], expected, rtol=2e-3, atol=2e-3)  # float16 on disk
    assert ds.images.dtype == torch.float16 and ds.images.shape == (10, 4, 4, 4)
    assert torch.equal(ds.labels, images.labels) and ds.class_names == NAMES
    assert sorted(f.name for f in tmp_path.iterdir()) == ["latents-00000.safetensors", "latents-00001.safetensors"]
    assert len(load_image_dataset(tmp_path, max_samples=3, image_size=4, channels=4)) == 3
    for settings in ({"image_size": 8}, {"channels": 3}):
        with pytest.raises(ValueError, match="do not fit latents of shape .4, 4, 4."):
            load_image_dataset(tmp_path, **settings)


def test_shift_factor_is_subtracted_before_scaling(tmp_path, images, vae):
    cache_latents(images, vae, tmp_path / "plain", posterior="mode")
    vae.register_to_config(shift_factor=0.25)
    try:
        cache_latents(images, vae, tmp_path / "shifted", posterior="mode")
    finally:
        vae.register_to_config(shift_factor=None)
    plain, shifted = (load_image_dataset(tmp_path / name)[:]["pixel_values"] for name in ("plain", "shifted"))
    expected = torch.full_like(plain, 0.25 * vae.config.scaling_factor)
    torch.testing.assert_close(plain - shifted, expected, rtol=0, atol=2e-3)


def test_samples_have_the_posterior_s_spread_and_do_not_depend_on_the_batch_size(tmp_path, vae):
    images = ImageDataset(as_tensor(pictures(256)), [0] * 256)
    for name, settings in {
        "a": {"batch_size": 64}, "b": {"batch_size": 100}, "c": {"batch_size": 64, "seed": 1},
        "mode": {"batch_size": 64, "posterior": "mode"},
    }.items():  # fmt: skip
        cache_latents(images, vae, tmp_path / name, shard_size=128, **settings)
    a, b, c, mode = (load_image_dataset(tmp_path / name)[:]["pixel_values"] for name in ("a", "b", "c", "mode"))
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        std = vae.encode(images[:]["pixel_values"]).latent_dist.std * vae.config.scaling_factor
    noises = [(sample - mode) / std for sample in (a, c)]
    for noise in noises:
        # 16384 draws of N(0, 1): standard errors 0.008 and 0.006.
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
    # Another seed is other noise, and so is another file of the same run: correlations have a standard error of 0.01.
    pairs = [(noises[0], noises[1]), (noises[0][:128], noises[0][128:])]
    assert all(abs(torch.stack([x.flatten(), y.flatten()]).corrcoef()[0, 1]) < 0.06 for x, y in pairs)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, images, vae):
    whole = cache_latents(images, vae, tmp_path / "whole", batch_size=2, shard_size=4)

    class Interrupted(ImageDataset):
        asked = []
        stop_at = 6

        def __getitem__(self, index):
            self.asked.append(index)
            if self.stop_at in index:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    partial = Interrupted(images.images, images.labels, NAMES)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(partial, vae, tmp_path / "partial", batch_size=2, shard_size=4)
    assert [f.name for f in (tmp_path / "partial").iterdir()] == ["latents-00000.safetensors"]
    with pytest.raises(ValueError, match="holds 1 of 3 latent files: run cache_latents again"):
        load_image_dataset(tmp_path / "partial")
    partial.stop_at, partial.asked = -1, []
    cache_latents(partial, vae, tmp_path / "partial", batch_size=2, shard_size=4)
    assert partial.asked == [[0], [4, 5], [6, 7], [8, 9]]  # one look at the shape, then what was missing
    resumed = load_image_dataset(tmp_path / "partial")
    assert resumed.fingerprint == load_image_dataset(whole).fingerprint


def test_latents_of_another_run_are_not_mixed_in(tmp_path, images, vae):
    cache_latents(images, vae, tmp_path, posterior="mode")
    before = (tmp_path / "latents-00000.safetensors").read_bytes()
    with pytest.raises(ValueError, match="written with another posterior"):
        cache_latents(images, vae, tmp_path)
    with pytest.raises(ValueError, match="written with another dataset"):
        cache_latents(images.select(range(9, -1, -1)), vae, tmp_path, posterior="mode")
    vae.quant_conv.bias.data.add_(1)
    try:
        with pytest.raises(ValueError, match="written with another vae"):
            cache_latents(images, vae, tmp_path, posterior="mode")
    finally:
        vae.quant_conv.bias.data.sub_(1)
    assert (tmp_path / "latents-00000.safetensors").read_bytes() == before


def test_lazy_datasets_can_be_encoded(tmp_path, images, vae):
    lazy = hub_dataset(images.images.permute(0, 2, 3, 1).numpy(), images.labels.tolist()).with_transform(
        lambda rows: {
            "pixel_values": as_tensor(np.stack([np.array(i) for i in rows["image"]])).float() / 127.5 - 1,
            "class_labels": torch.tensor(rows["label"]),
        }
    )
    cache_latents(lazy, vae, tmp_path / "lazy", posterior="mode")
    cache_latents(images, vae, tmp_path / "memory", posterior="mode")
    a, b = load_image_dataset(tmp_path / "lazy"), load_image_dataset(tmp_path / "memory")
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=0)
    assert torch.equal(a.labels, b.labels)


def test_latents_of_a_split_are_never_taken_for_another(tmp_path, images, vae):
    cache_latents(images, vae, tmp_path / "flat")
    with pytest.raises(ValueError, match="holds latents of split 'train' only"):
        load_image_dataset(tmp_path / "flat", "test")
    for split, rows in (("train", range(6)), ("test", range(6, 10))):
        cache_latents(images.select(rows), vae, tmp_path / "both" / split)
    cache_latents(images, vae, tmp_path / "both")  # a split's own folder goes before the files beside it
    assert len(load_image_dataset(tmp_path / "both")) == 6 and len(load_image_dataset(tmp_path / "both", "test")) == 4


def test_images_that_do_not_fit_the_vae(tmp_path, images, vae):
    grey = ImageDataset(images.images[:, :1], images.labels)
    odd = ImageDataset(images.images[..., :7, :7], images.labels)
    latent = ImageDataset(torch.zeros(2, 3, 8, 8), [0, 1])
    cases = [(grey, "images .1, 8, 8. do not fit"), (odd, "images .3, 7, 7. do not fit"), (latent, "latents already")]
    for ds, message in cases:
        with pytest.raises(ValueError, match=message):
            cache_latents(ds, vae, tmp_path)
    with pytest.raises(ValueError, match="unknown posterior 'mean'"):
        cache_latents(images, vae, tmp_path, posterior="mean")
    with pytest.raises(ValueError, match="batch_size=0"):
        cache_latents(images, vae, tmp_path, batch_size=0)


def test_latents_that_overflow_are_never_written(tmp_path, images, vae):
    scaling_factor = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=1e30)
    try:
        with pytest.raises(ValueError, match="latent of row 0 is not finite .*dtype=torch.float32"):
            cache_latents(images, vae, tmp_path)
    finally:
        vae.register_to_config(scaling_factor=scaling_factor)
    assert list(tmp_path.iterdir()) == []


def test_damaged_latent_files_are_named(tmp_path):
    file = tmp_path / "latents-00000.safetensors"
    good = {"latents": torch.randn(3, 4, 2, 2).half(), "labels": torch.tensor([0, 1, 2])}
    save_file(good, file)
    assert load_image_dataset(tmp_path, scaling_factor=2.0)[1]["pixel_values"].equal(good["latents"][1].float() * 2)
    broken = good["latents"].clone()
    broken[2, 0, 0, 0] = float("inf")
    for tensors, message in [
        ({"latents": broken, "labels": good["labels"]}, "00000.safetensors: the latent of row 2 is not finite"),
        ({"latents": good["latents"]}, "00000.safetensors has no labels, only latents"),
        ({**good, "latents": good["latents"].byte()}, "holds uint8, not latents"),
        ({**good, "labels": torch.tensor([0, -1, 2])}, "row 1, -1, is negative"),
    ]:
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            load_image_dataset(tmp_path)
    save_file(good, file)
    save_file({**good, "latents": torch.zeros(3, 8, 2, 2).half()}, tmp_path / "latents-00001.safetensors")
    with pytest.raises(ValueError, match="00001.safetensors does not belong to .*00000.safetensors"):
        load_image_dataset(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="00000.safetensors is truncated or not a safetensors file"):
        load_image_dataset(tmp_path)


def test_latent_files_say_how_they_were_made(tmp_path, images, vae):
    from safetensors import safe_open

    cache_latents(images, vae, tmp_path, seed=3)
    file = tmp_path / "latents-00000.safetensors"
    with safe_open(file, "pt") as f:
        settings = json.loads(f.metadata()["settings"])
    assert settings["posterior"] == "sample" and settings["seed"] == 3 and settings["dataset"] == images.fingerprint
    assert settings["scaling_factor"] == vae.config.scaling_factor
    assert set(load_file(file)) == {"latents", "labels"}
