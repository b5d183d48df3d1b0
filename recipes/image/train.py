"""
Image classification by workers that meet every few steps: a stock `Trainer` and one `SlowMoCallback`.

    accelerate launch --config_file recipes/configs/cpu_two_processes.yaml recipes/image/train.py

With no flags: two processes, the shipped Fashion-MNIST subset, a small ResNet, slow momentum on. Every field
of `SlowMoConfig` and of `TrainingArguments` is a flag. At the end: a table, a JSON record in `--output_dir` and, with
`--plot`, a picture.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import datasets
import numpy as np
import torch
import transformers
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from image.data import ImageSets, load_images
from image.pixels import Batch, LargeImages, SmallImages, crop_padding, make_dataset, mean_and_std
from image.presets import PRESETS, step_decay, zero_last_norms
from image.small_resnet import ARCHITECTURES, make_model
from one_run import OneRun, check_resumed_model, checkpoint_to_resume, settings_of
from paper_rows import set_preset
from records import (
    DataError,
    SettingError,
    describe_run,
    divide_warm_up,
    end_program,
    plot,
    print_table,
    write_record,
)
from slowmo_hf import SlowMoCallback, SlowMoConfig


@dataclass
class ScriptArguments:
    """What is learned, and what is left behind."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "The paper's settings, as defaults that other flags override: model, data, batch, schedule.",
            "choices": list(PRESETS),
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, or a folder: images as train/<class>/* and test/<class>/*, train*.parquet and "
            "test*.parquet, or what DatasetDict.save_to_disk wrote. The shipped images by default."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images; by default image, or the only one with images."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column with the class labels; by default label, or the only one with class labels."},
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Split to train on: its name, or its folder's, or how its Parquet files' names start."},
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split to test on; by default test or, where there is none, validation or val."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Use only the first rows (evenly spread ones where rows are sorted by class), for a dry run."
        },
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for test rows."})
    architecture: str = field(
        default="auto",
        metadata={
            "help": "auto: the small ResNet for images up to 64 pixels, else resnet50.",
            "choices": ["auto", *ARCHITECTURES],
        },
    )
    width: int = field(default=32, metadata={"help": "Channels of the small ResNet's stem and first stage."})
    zero_init_residual: bool = field(
        default=False, metadata={"help": "Start with the last BatchNorm of every residual branch at 0."}
    )
    warmup_epochs: float = field(default=0.0, metadata={"help": "Linear warm-up, with --decay_epochs."})
    decay_epochs: list[int] = field(
        default_factory=list,
        metadata={
            "help": "The learning rate falls to a tenth at each of these, in place of --lr_scheduler_type and "
            "--warmup_steps."
        },
    )
    inner_momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum of the inner SGD, --optim sgd."})
    plot: bool = field(default=False, metadata={"help": "Write a PNG of loss, accuracy, drift, utilisation, bytes."})

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be >= 1 channel, got {self.width}. Set --width.")
        if self.warmup_epochs and not self.decay_epochs:
            raise ValueError(
                f"warmup_epochs is for --decay_epochs, got {self.warmup_epochs} without. Set --warmup_steps."
            )


# Of these, what a model was trained by; a run that goes on has them as they were (`one_run.py`).
TRAINED_BY = (
    *("dataset_name", "train_split", "max_train_samples", "image_column", "label_column"),
    *("architecture", "width", "zero_init_residual", "warmup_epochs", "decay_epochs", "inner_momentum"),
)
# Of a model's config.json, what a checkpoint's must be to fit.
SHAPE = ("num_channels", "embedding_size", "hidden_sizes", "depths", "num_labels")


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments with this recipe's defaults."""

    output_dir: str | None = field(
        default="outputs/image_classification", metadata={"help": "Model, record and plot go here."}
    )
    num_train_epochs: float = field(default=8, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch per process."})
    per_device_eval_batch_size: int = field(default=250, metadata={"help": "Test batch per process."})
    learning_rate: float = field(
        default=0.1, metadata={"help": "Peak inner learning rate; slow momentum multiplies it by 1/(1-beta)."}
    )
    optim: str = field(
        default="sgd",
        metadata={
            "help": "sgd: SGD with Nesterov momentum (--inner_momentum) and weight decay on every parameter, as is "
            "usual for ResNets. Any other of Trainer's optimizers is made by Trainer, from its own flags "
            "(--adam_beta1, --optim_args, ...), without weight decay on biases; set --learning_rate for it."
        },
    )
    weight_decay: float = field(
        default=5e-4, metadata={"help": "Weight decay of the inner optimizer; which parameters: see --optim."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after warm-up."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or a fraction of all steps."})
    logging_steps: float = field(
        default=60, metadata={"help": "A multiple of sync_every, so that logging waits for nobody."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to test the average."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, ..."})
    use_cpu: bool = field(
        default=not torch.cuda.is_available(), metadata={"help": "On by default where there is no GPU."}
    )
    average_tokens_across_devices: bool = field(
        default=False,
        metadata={"help": "Off: the ResNets' loss is a mean over images already, and would be scaled by the world."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Page-locked batches, for GPUs."}
    )

    def __post_init__(self) -> None:
        divide_warm_up(self)
        super().__post_init__()


def main() -> None:
    """Parse, train, test, and write down what came out."""
    script, config, args = parse(sys.argv[1:])
    try:
        settings = settings_of(config, args, {name: getattr(script, name) for name in TRAINED_BY})
        resumed = checkpoint_to_resume(args, settings)
        sets = load_images(
            script.dataset_name,
            script.image_column,
            script.label_column,
            script.train_split,
            script.test_split,
            script.max_train_samples,
            script.max_eval_samples,
        )
        transformers.set_seed(args.seed)
        trainer = make_trainer(script, config, args, sets)
        shape = {name: getattr(trainer.model.config, name) for name in SHAPE}
        check_resumed_model(resumed, shape, f"this run's of {sets.name!r}", "--architecture, --width and the images")
    except (DataError, SettingError) as error:
        end(error)
    run = OneRun(trainer, settings)
    if trainer.is_world_process_zero():
        print_choices(script, args, sets)
    trainer.train(resume_from_checkpoint=resumed)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        record = make_record(config, trainer, sets, metrics, run)
        write_record(record, Path(args.output_dir) / "record.json")
        print_table(record, {"accuracy of the average": f"{record['metrics']['test_accuracy']:.4f}"})
        if script.plot:
            picture = Path(args.output_dir) / "training.png"
            plot(trainer.state.log_history, picture, ("eval_accuracy", "test accuracy"), record)


def end(error: object) -> NoReturn:
    """End the program with one line."""
    end_program(__file__, error)


def parse(flags: list[str]) -> tuple[ScriptArguments, SlowMoConfig, RecipeTrainingArguments]:
    """Every field of the three is a flag; a wrong value ends the program with one line that says what is allowed."""
    parser = HfArgumentParser((ScriptArguments, SlowMoConfig, RecipeTrainingArguments))
    parser.error = end  # argparse's own would print all flags first
    try:
        set_preset(parser, flags, PRESETS)
        script, config, args = parser.parse_args_into_dataclasses(flags)
        _check_flags(script, args)
        _check_schedule_flags(script, args)
    except ValueError as error:
        end(error)
    return script, config, args


def _check_flags(script: ScriptArguments, args: TrainingArguments) -> None:
    """No flag is ignored in silence."""
    if args.prediction_loss_only:
        raise SettingError(
            "prediction_loss_only must be false, got True: the test counts right answers. Leave "
            "--prediction_loss_only out."
        )
    if args.optim == "sgd" and args.optim_args:
        raise SettingError(
            f"optim_args is for other optimizers than sgd, got {args.optim_args!r}. Use --inner_momentum and "
            "--weight_decay."
        )
    if args.optim_args and any(part.count("=") != 1 for part in args.optim_args.split(",")):
        raise SettingError(
            f"optim_args must be name=value, several of them with commas between, got {args.optim_args!r}."
        )
    if args.optim != "sgd" and script.inner_momentum != ScriptArguments.inner_momentum:
        raise SettingError(
            f"inner_momentum is for --optim sgd, got {script.inner_momentum} with --optim {args.optim.value}. Leave "
            "it out, or use this optimizer's own flags, such as --adam_beta1 or --optim_args."
        )


_SCHEDULE = ("lr_scheduler_type", "warmup_steps")


def _check_schedule_flags(script: ScriptArguments, args: TrainingArguments) -> None:
    """The same of `--decay_epochs`, which makes the schedule."""
    usual = SimpleNamespace(warmup_ratio=0.0, **{name: getattr(RecipeTrainingArguments, name) for name in _SCHEDULE})
    divide_warm_up(usual)
    for name in _SCHEDULE if script.decay_epochs else ():
        given = getattr(getattr(args, name), "value", getattr(args, name))
        if given != getattr(usual, name):
            raise SettingError(
                f"{name} has no effect with decay_epochs={script.decay_epochs}, got {str(given)!r}: the "
                f"schedule is a warm-up (--warmup_epochs) and these decays. Leave --{name} out."
            )


def make_trainer(script: ScriptArguments, config: SlowMoConfig, args: TrainingArguments, sets: ImageSets) -> Trainer:
    """A stock Trainer with its optimizer; the callback is the one line that makes workers local."""
    train, test = (
        make_dataset(sets.train, sets, seed=args.seed if args.data_seed is None else args.data_seed),
        make_dataset(sets.test, sets),
    )
    mean, std = mean_and_std(train)
    model = make_model(sets.image_size, sets.channels, sets.label_names, script.width, script.architecture)
    if script.zero_init_residual:
        zero_last_norms(model)
    if script.width not in (ScriptArguments.width, model.config.embedding_size):
        raise SettingError(
            f"width is of the small ResNet, got {script.width} with another, whose stem has "
            f"{model.config.embedding_size} channels. Leave it out, or set --architecture small."
        )
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=Batch(mean, std, crop_padding=crop_padding(sets.image_size), flip=True),
            compute_metrics=accuracy,
            optimizers=(make_sgd(model, script.inner_momentum, args) if args.optim == "sgd" else None, None),
            callbacks=[NewDraws(train), SlowMoCallback(config)],
        )
        if script.decay_epochs:
            steps = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
            trainer.lr_scheduler = step_decay(
                trainer.create_optimizer(), steps, script.warmup_epochs, script.decay_epochs
            )
        # Now, not in train(): a wrong setting or a package that is not installed is the user's to mend.
        trainer.create_optimizer()
        if args.dataloader_drop_last and not len(trainer.get_train_dataloader()):
            raise SettingError(
                f"dataloader_drop_last must be false with fewer rows than a batch of every process, got {len(train)} "
                f"rows and per_device_train_batch_size={args.per_device_train_batch_size}. Set either."
            )
    except (ImportError, RuntimeError, ValueError) as error:
        raise SettingError(error) from error
    return trainer


class NewDraws(TrainerCallback):
    """Other crops and flips in every pass, the same ones where a pass is resumed."""

    def __init__(self, train: SmallImages | LargeImages) -> None:
        self.train = train

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The pass that begins or goes on, counted as Trainer does."""
        self.train.set_epoch(
            state.global_step // math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        )


def make_sgd(model: torch.nn.Module, momentum: float, args: TrainingArguments) -> torch.optim.SGD:
    """
    With Nesterov momentum, and weight decay on every parameter; Trainer's own sgd has no momentum, and leaves biases
    alone.
    """
    return torch.optim.SGD(
        model.parameters(),
        lr=args.learning_rate,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=args.weight_decay,
    )


def print_choices(script: ScriptArguments, args: TrainingArguments, sets: ImageSets) -> None:
    """What was chosen where the user might expect another choice, and what a figure would hide."""
    if script.test_split is None and sets.test_split != "test":
        print(f"test_split was not given: the test images are those of {sets.test_split!r}", flush=True)
    for name, usual in (("image_column", "image"), ("label_column", "label")):
        if getattr(script, name) is None and getattr(sets, name) != usual:
            print(f"{name} was not given: it is {getattr(sets, name)!r}", flush=True)
    if args.optim != "sgd" and args.learning_rate == RecipeTrainingArguments.learning_rate:
        print(
            f"learning_rate={args.learning_rate} was chosen for sgd, not for {args.optim.value}: set --learning_rate",
            flush=True,
        )
    if args.load_best_model_at_end:
        print("the best checkpoint is chosen by the test images, so its accuracy on them is too high", flush=True)
    if script.decay_epochs and args.max_steps <= 0 and args.num_train_epochs <= min(script.decay_epochs):
        print(
            f"the learning rate never falls: decay_epochs={script.decay_epochs}, and num_train_epochs is "
            f"{args.num_train_epochs:g}",
            flush=True,
        )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of test images whose largest logit is the label's."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


def make_record(
    config: SlowMoConfig, trainer: Trainer, sets: ImageSets, metrics: dict[str, float], run: OneRun
) -> dict[str, Any]:
    """Everything that a reader needs to judge the run, and to run it again."""
    tests = {entry["step"]: entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry}
    return {
        "study": "single",
        "task": "image_classification",
        "dataset": sets.name,
        "train_rows": len(sets.train),
        "test_rows": len(sets.test),
        "test_split": sets.test_split,
        "metrics": {"test_accuracy": metrics["eval_accuracy"], "test_loss": metrics["eval_loss"]},
        "curve": [{"step": step, "test_accuracy": value} for step, value in tests.items()],
        **describe_run(config, trainer, run, [datasets]),
    }


if __name__ == "__main__":
    main()
