"""The image recipe's optimizer, batches and models."""

import dataclasses
import json
import pickle
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageClassification, EvalPrediction

from image import pixels
from image import train as recipe
from image.data import load_images
from image.pixels import Batch
from image.small_resnet import SmallResNetForImageClassification, make_model

# ---- the inner optimizer ----


def trainer_with(folder: Path, flags: str = ""):
    script, config, args = recipe.parse(
        f"--output_dir {folder} --use_cpu 1 --width 4 --max_train_samples 64 {flags}".split()
    )
    sets = load_images(None, max_train_samples=64, max_eval_samples=8)
    return recipe.make_trainer(script, config, args, sets)


def test_default_optimizer(tmp_path):
    """The SGD that the recorded runs used: one group with every parameter, Nesterov momentum, weight decay on all."""
    trainer = trainer_with(tmp_path)
    assert type(trainer.optimizer) is torch.optim.SGD
    (group,) = trainer.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.model.parameters()]
    settings = {name: value for name, value in group.items() if name != "params"}
    stock = torch.optim.SGD([torch.zeros(1)]).defaults
    assert settings == {**stock, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def test_sgd_flags(tmp_path):
    trainer = trainer_with(tmp_path, "--inner_momentum 0 --weight_decay 0.01 --learning_rate 0.3")
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0, False, 0.01)


def test_named_optimizer_is_trainer_s_own(tmp_path):
    """Its class and settings from its own flags; no weight decay on biases."""
    flags = (
        "--optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-7 --weight_decay 0.02 "
        "--learning_rate 2e-3"
    )
    trainer = trainer_with(tmp_path, flags)
    assert type(trainer.optimizer) is torch.optim.AdamW
    decayed, spared = trainer.optimizer.param_groups
    for group in (decayed, spared):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-7, 2e-3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    biases = {id(p) for name, p in trainer.model.named_parameters() if name.endswith("bias")}
    assert biases <= {id(p) for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(trainer.model.parameters()))


@pytest.mark.skipif(Version(version("transformers")) < Version("5"), reason="its Trainer gives RMSprop no arguments")
def test_optim_args_reach_the_named_optimizer(tmp_path):
    trainer = trainer_with(tmp_path, "--optim rmsprop --optim_args alpha=0.9,momentum=0.5 --learning_rate 1e-3")
    assert type(trainer.optimizer) is torch.optim.RMSprop
    assert (trainer.optimizer.param_groups[0]["alpha"], trainer.optimizer.param_groups[0]["momentum"]) == (0.9, 0.5)


def test_choices_are_said(tmp_path, capsys):
    """Where the recipe chose for the user; silent with the defaults."""
    sets = load_images(None, max_train_samples=8, max_eval_samples=8)
    script, _, args = recipe.parse(["--output_dir", str(tmp_path), "--use_cpu", "1"])
    recipe.print_choices(script, args, sets)
    assert capsys.readouterr().out == ""
    script, _, args = recipe.parse(["--output_dir", str(tmp_path), "--use_cpu", "1", "--optim", "adamw_torch"])
    recipe.print_choices(script, args, dataclasses.replace(sets, test_split="val"))
    assert capsys.readouterr().out.splitlines() == [
        "test_split was not given: the test images are those of 'val'",
        "learning_rate=0.1 was chosen for sgd, not for adamw_torch: set --learning_rate",
    ]


def test_accuracy():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert recipe.accuracy(EvalPrediction(logits, np.array([1, 0, 0, 0]))) == {"accuracy": 0.75}


def test_record_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "new" / "record.json"
    recipe.write_record({"study": "first"}, path)

    def torn(self, text):
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        recipe.write_record({"study": "second"}, path)
    assert json.loads(path.read_text()) == {"study": "first"}


# ---- batches ----


def rows_of(images: torch.Tensor, draws: tuple[int, int, int] | None) -> list[dict]:
    return [{"image": image, "label": torch.tensor(index), "draws": draws} for index, image in enumerate(images)]


def test_batch_by_hand():
    """A pixel of 51 is 0.2 of full scale; (0.2 - 0.1) / 0.2 = 0.5. Rows of a test are left where they are."""
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    batch = pickle.loads(pickle.dumps(Batch(mean=0.1, std=0.2, crop_padding=2, flip=True)))
    made = batch(rows_of(images, None))
    torch.testing.assert_close(made["pixel_values"], torch.full((2, 1, 4, 4), 0.5))
    assert made["labels"].tolist() == [0, 1]


def test_augmentation_is_a_shift_of_the_image_or_its_mirror():
    """
    With padding 1 a 3x3 image has 9 places, mirrored 9 more: all 18 occur, nothing else, and black comes in from
    outside.
    """
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    allowed = set()
    for picture in (image, image.flip(-1)):
        padded = torch.zeros(1, 5, 5, dtype=torch.uint8)
        padded[:, 1:4, 1:4] = picture
        allowed |= {tuple(padded[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    made = Batch(mean=0, std=1, crop_padding=1, flip=True)(rows_of(image.expand(500, 1, 3, 3), (0, 0, 0)))
    seen = {tuple((image * 255).round().int().flatten().tolist()) for image in made["pixel_values"]}
    assert seen == allowed
    assert len(seen) == 18


def test_a_batch_that_is_made_again_is_the_same_and_draws_from_no_global_generator():
    """By seed, pass and first row; a DataLoader worker that outlives a pass hears of the next one."""
    sets = load_images(None, max_train_samples=64, max_eval_samples=32)
    batch = Batch(mean=0, std=1, crop_padding=2, flip=True)

    def made(seed: int, epoch: int, first: int) -> torch.Tensor:
        rows = pixels.make_dataset(sets.train, sets, seed=seed)
        rows.set_epoch(epoch)
        return batch([rows[index] for index in (first, 7, 8, 9)])["pixel_values"][1:]

    before = torch.get_rng_state()
    first = made(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(made(1, 2, 3), first)
    for others in ((0, 2, 3), (1, 1, 3), (1, 2, 4)):
        assert not torch.equal(made(*others), first)
    rows = pixels.make_dataset(sets.train, sets, seed=1)
    loader = torch.utils.data.DataLoader(rows, batch_size=64, collate_fn=batch, num_workers=1, persistent_workers=True)
    passes = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        passes.append(next(iter(loader))["pixel_values"])
    assert torch.equal(passes[0], passes[2])
    assert not torch.equal(passes[0], passes[1])


@pytest.mark.parametrize(
    ("step", "accumulation", "told"),
    [(0, 1, 0), (28, 1, 0), (29, 1, 1), (57, 1, 1), (14, 2, 0), (15, 2, 1), (30, 2, 2)],
)
def test_the_pass_is_counted_from_the_steps(step, accumulation, told):
    """29 batches: a pass is 29 steps, or 15 of two batches, of which the last has one."""
    seen: list[int] = []
    rows = SimpleNamespace(set_epoch=seen.append)
    args, state = SimpleNamespace(gradient_accumulation_steps=accumulation), SimpleNamespace(global_step=step)
    recipe.NewDraws(rows).on_epoch_begin(args, state, None, train_dataloader=range(29))
    assert seen == [told]


def test_large_images_have_boxes_of_their_own():
    slope = Image.linear_gradient("L").resize((300, 300)).convert("RGB")
    train = datasets.Dataset.from_dict(
        {"image": [slope], "label": [0]},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    sets = SimpleNamespace(image_column="image", label_column="label", image_size=224)
    rows = pixels.make_dataset(train, sets, seed=0)
    first = rows[0]["image"]
    assert torch.equal(rows[0]["image"], first)
    assert torch.equal(pixels.make_dataset(train, sets, seed=-(2**64))[0]["image"], first), (
        "a negative seed is one too"
    )
    rows.set_epoch(1)
    assert not torch.equal(rows[0]["image"], first)


def test_every_image_has_its_own_shift():
    torch.manual_seed(0)
    image = torch.arange(784, dtype=torch.float32).view(1, 1, 28, 28)
    shifted = pixels.random_crop(image.expand(8, 1, 28, 28), padding=2)
    assert len({tuple(one.flatten().tolist()) for one in shifted}) > 1
    assert [pixels.crop_padding(size) for size in (28, 32, 224)] == [2, 4, 0]


def test_boxes():
    """The shorter side, 256, gives a square of 224 in the middle."""
    assert pixels.centre_box(256, 512) == (16.0, 144.0, 240.0, 368.0)
    torch.manual_seed(0)
    boxes = np.array([pixels.random_resized_box(300, 200) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 300 + 1e-3).all()
    assert (bottom <= 200 + 1e-3).all()
    area = (right - left) * (bottom - top) / 60_000
    assert 0.079 < area.min() < 0.12
    assert 0.8 < area.max() <= 1.0 + 1e-6


# ---- models ----


def test_small_resnet_by_hand(tmp_path):
    """28x28 stays 28x28 through the stem, then 14, 7, 4. Saved and loaded, it is the same function."""
    torch.manual_seed(0)
    model = make_model(28, 1, ["a", "b"], width=8).eval()
    pixels = torch.randn(2, 1, 28, 28)
    states = model.resnet(pixels, output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(8, 28, 28), (8, 14, 14), (16, 7, 7), (32, 4, 4)]
    stem = model.resnet.embedder.embedder.convolution.weight
    assert stem.detach().std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.3)  # Kaiming, fan out
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, SmallResNetForImageClassification)
    torch.testing.assert_close(loaded.eval()(pixels).logits, model(pixels).logits, rtol=0, atol=0)


def test_large_images_get_resnet_50():
    with torch.device("meta"):
        model = make_model(224, 3, [str(number) for number in range(1000)])
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
