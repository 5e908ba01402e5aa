"""What a run refuses or stops at: losses that are not finite, data that do not fit, settings out of range."""

import math
import threading

import datasets
import pytest
import torch
from torch import Tensor

from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.data import ImageDataset
from hf_diffusionblocks.objectives import DenoisingScoreMatching
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.checkpoint import find_checkpoints
from hf_diffusionblocks.training.data_stream import SampleOrder
from hf_diffusionblocks.training.trainer import NonFiniteLossError
from runs import arguments, everything, make_trainer, reset_accelerate, updates
from tiny import NUM_CLASSES, TinyImages, tiny_dit


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


# -- what goes wrong ---------------------------------------------------------------------------------------------


class Spoiled(DenoisingScoreMatching):
    """Spoils one update of one block."""

    def __init__(self, block: int, update: int, how: str):
        super().__init__()
        self.block, self.update, self.how = block, update, how
        self.count = 0

    def __call__(self, model, block, batch, generator=None):
        result = super().__call__(model, block, batch, generator)
        self.count += block == self.block
        if block == self.block and self.count == self.update:
            if self.how == "gradient":
                parameter = next(p for _, p in model.block_parameters(block))
                result.loss = result.loss + (parameter * 0).abs().sqrt().sum()  # finite, with an infinite slope
            else:
                result.loss = result.loss * float(self.how)
        return result


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, how, max_grad_norm):
    trainer = make_trainer(
        tmp_path,
        objective=Spoiled(block=1, update=3, how=how),
        block_order="round_robin",
        max_steps=6,
        save_steps=3,
        save_total_limit=None,
        max_grad_norm=max_grad_norm,
    )
    low, high = trainer.model.partition.range(1, training=True)
    with pytest.raises(NonFiniteLossError, match=r"block 1 .* in its update 3 \(iteration 8\)") as caught:
        trainer.train()
    message = str(caught.value)
    noise = [float(word.rstrip(".")) for word in message.split("from ")[1].split(". ")[0].split(" to ")]
    assert low * 0.99 <= noise[0] <= noise[1] <= high * 1.01
    assert f"{tmp_path / 'checkpoint-6'}" in message
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    assert all(math.isfinite(row["loss"]) for row in updates(tmp_path))
    # the last checkpoint is good: a run without the fault goes on from it
    resumed = make_trainer(
        tmp_path, block_order="round_robin", max_steps=6, save_steps=3, max_grad_norm=max_grad_norm
    ).train(resume_from_checkpoint=True)
    assert resumed["iterations"] == 18 and all(math.isfinite(row["loss"]) for row in updates(tmp_path))


def test_before_the_first_checkpoint_the_message_says_that_there_is_none(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"No checkpoint had been written \(save_steps=500; give a"):
        make_trainer(tmp_path, objective=Spoiled(0, 1, "nan")).train()
    assert find_checkpoints(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_named(tmp_path, value):
    data = TinyImages(8)
    data.pixel_values[5, 0, 3, 3] = value
    with pytest.raises(
        ValueError, match=r"1 of 4 samples .* non-finite pixel_values: rows 5 of the training data \(8 rows\)"
    ) as caught:
        make_trainer(tmp_path, dataset=data, block_order="sequential").train()
    # what was learned before is kept, and is what a run on good data has learned by then
    found = find_checkpoints(tmp_path)
    if not found:
        assert "Nothing had been learned yet" in str(caught.value)
        return
    assert len(found) == 1 and str(found[0]) in str(caught.value)


def test_bad_pixels_met_late_leave_a_checkpoint_of_the_good_state(tmp_path):
    data = TinyImages(16)
    order = SampleOrder(16, 0, 0).indices(8, 4)  # what block 0 sees in its third update
    data.pixel_values[order[2], 0, 3, 3] = float("nan")
    trainer = make_trainer(tmp_path / "bad", dataset=data, blocks=[0], max_steps=4, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=rf"rows {order[2]} of the training data .* 2 iterations is in .*checkpoint-2"):
        trainer.train()
    good = make_trainer(tmp_path / "good", dataset=TinyImages(16), blocks=[0], max_steps=2)
    good.train()
    saved = [BlockedDiTModel.from_pretrained(tmp_path / name / "checkpoint-2") for name in ("bad", "good")]
    assert same_tensors(*(model.state_dict() for model in saved))


class Columns:
    """A data set of other columns."""

    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in self.columns.items()}


IMAGES, LABELS = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (TinyImages(0), "is empty"),
        (Columns(image=IMAGES, label=LABELS), r"holds \['image', 'label'\]; the trainer needs 'pixel_values'"),
        (Columns(pixel_values=IMAGES), r"holds \['pixel_values'\]"),
        (torch.utils.data.TensorDataset(IMAGES, LABELS), "holds (tuple|list)"),
        (TinyImages(size=10), r"does not fit the model: the input has shape \[4, 1, 10, 10\]"),
        (TinyImages(channels=3), r"does not fit the model: the input has shape \[4, 3, 8, 8\]"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS + 11), "class_labels run from 11 to 11"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS - 1), "class_labels run from -1 to -1"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS.float()), "give whole numbers"),
        (Columns(pixel_values=IMAGES.flatten(1), class_labels=LABELS), r"the input has shape \[4, 64\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("role", ["training", "held-out"])
def test_data_that_does_not_fit_is_refused_before_any_work(tmp_path, dataset, message, role):
    data = {"dataset": dataset} if role == "training" else {"eval_dataset": dataset}
    with pytest.raises(ValueError, match=f"the {role} data set .*{message}"):
        make_trainer(tmp_path / "run", **data)
    assert not (tmp_path / "run").exists()


def test_a_label_out_of_range_anywhere_stops_the_run(tmp_path):
    data = TinyImages(16)
    data.class_labels[9] = 11
    with pytest.raises(ValueError, match="have labels out of range: rows 9 of the training data"):
        make_trainer(tmp_path, dataset=data, max_steps=4).train()


def test_the_null_class_is_no_label_of_data(tmp_path):
    """Label dropout draws it; as a label it would train the unconditional branch on one class's images."""
    first, late = TinyImages(16), TinyImages(16)
    first.class_labels[0] = late.class_labels[9] = NUM_CLASSES
    with pytest.raises(ValueError, match="class_labels run from .* to 10 .* have labels of 0 to 9"):
        make_trainer(tmp_path, dataset=first)
    with pytest.raises(ValueError, match="labels out of range: rows 9"):
        make_trainer(tmp_path, dataset=late, max_steps=4).train()
    model = tiny_dit(3)
    model.denoise(first.pixel_values[:2], 1.0, class_labels=torch.tensor([NUM_CLASSES, 1]))  # sampling may use it


@pytest.mark.parametrize("kind", ["images", "datasets"])
def test_all_labels_are_checked_before_any_work_where_they_can_be_read(tmp_path, kind):
    labels = torch.arange(12) % 11
    if kind == "images":
        data = ImageDataset(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), labels)
    else:
        columns = {"pixel_values": torch.zeros(12, 1, 8, 8).tolist(), "class_labels": labels.tolist()}
        data = datasets.Dataset.from_dict(columns).with_format("torch")
    with pytest.raises(ValueError, match=r"from 0 to 10 \(row 10 is the first out of range\)"):
        make_trainer(tmp_path / "run", dataset=data)
    assert not (tmp_path / "run").exists()


def test_data_of_the_wrong_form_is_refused_with_advice(tmp_path):
    plain = datasets.Dataset.from_dict({"pixel_values": torch.zeros(4, 1, 8, 8).tolist(), "class_labels": [0] * 4})
    with pytest.raises(ValueError, match=r'with_format\("torch"\)'):
        make_trainer(tmp_path, dataset=plain)
    bytes_ = Columns(pixel_values=torch.full((8, 1, 8, 8), 200, dtype=torch.uint8), class_labels=LABELS)
    with pytest.raises(ValueError, match=r"torch.uint8; .* scale pixels of 0 to 255 to \[-1, 1\]"):
        make_trainer(tmp_path, dataset=bytes_)
    floats = Columns(pixel_values=torch.full((8, 1, 8, 8), 200.0), class_labels=LABELS)
    with pytest.raises(ValueError, match=r"reach 200; pixels must lie in \[-1, 1\]"):
        make_trainer(tmp_path, dataset=floats)


def test_a_data_set_that_knows_single_samples_only_is_collated(tmp_path):
    class Single(torch.utils.data.Dataset):
        data = TinyImages(16)

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if not isinstance(index, int):
                raise TypeError("one at a time")
            return {"pixel_values": self.data.pixel_values[index], "class_labels": self.data.class_labels[index]}

    single = make_trainer(tmp_path / "a", dataset=Single())
    batched = make_trainer(tmp_path / "b", dataset=TinyImages(16))
    single.train()
    batched.train()
    assert same_tensors(single.model.state_dict(), batched.model.state_dict())


def test_worker_processes_change_nothing(tmp_path):
    trainers = []
    for workers in (0, 1):
        trainers.append(make_trainer(tmp_path / str(workers), dataloader_num_workers=workers))
        trainers[-1].train()
    assert all(same_tensors(everything(trainers[0])[b], everything(trainers[1])[b]) for b in range(3))


@pytest.mark.parametrize("blocks, message", [([3], "block 3 does not exist"), ([0], "block 0 is not loaded")])
def test_blocks_that_cannot_be_trained(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_dit(3, blocks=[1, 2]), blocks=blocks)


def test_a_run_in_another_thread_is_the_same_run(tmp_path):
    trainers = [make_trainer(tmp_path / name) for name in "ab"]
    thread = threading.Thread(target=trainers[0].train)
    thread.start()
    thread.join()
    trainers[1].train()
    assert all(same_tensors(everything(trainers[0])[b], everything(trainers[1])[b]) for b in range(3))


def test_training_no_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="blocks"):
        make_trainer(tmp_path, blocks=[]).train()


def test_runs_of_other_precisions_follow_each_other_in_one_process(tmp_path):
    make_trainer(tmp_path / "a").train()
    make_trainer(tmp_path / "b", mixed_precision="bf16").train()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs=0.0 must be positive"),
        ({"max_steps": -1, "num_train_epochs": float("inf")}, "num_train_epochs=inf must be positive"),
        ({"block_order": "randm"}, "unknown block_order 'randm': did you mean 'random'"),
        ({"steps_per_visit": 0}, "steps_per_visit=0 must be a whole number of at least 1"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5 must be a whole number"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a finite number"),
        ({"max_stpes": 3}, "unknown training argument 'max_stpes': did you mean 'max_steps'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a positive number"),
        ({"lr_scheduler_type": "cosin"}, "unknown lr_scheduler_type 'cosin': did you mean 'cosine'"),
        ({"mixed_precision": "fp16"}, "unknown mixed_precision 'fp16'.*Allowed: bf16, no"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must not be negative"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 must lie in \[0, 1\)"),
        ({"ema_max_decay": 1.0}, r"ema_max_decay=1.0 must lie in \[0, 1\)"),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1"),
        ({"save_steps": -1}, "save_steps=-1 must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments("unused", **settings)


def test_one_tracker_may_be_named_without_a_list():
    assert arguments("unused", report_to="tensorboard").report_to == ["tensorboard"]
    assert arguments("unused", report_to="none").report_to == []


def test_numbers_may_be_text_and_no_may_be_false_as_yaml_gives_them():
    args = arguments("unused", learning_rate="1e-3", max_steps="2e3", mixed_precision=False)
    assert (args.learning_rate, args.max_steps, args.mixed_precision) == (1e-3, 2000, "no")


def test_without_a_word_a_run_leaves_checkpoints():
    assert DiffusionBlocksTrainingArguments().save_steps == 500
