"""The image recipe, run as a user runs it; launch configurations and the Slurm script."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from PIL import Image
from transformers import AutoModelForImageClassification

from harness import patience
from image import pixels
from image import train as recipe
from image.data import load_images
from image.pixels import Batch
from images import write_images
from launcher import ACCELERATE_LAUNCH, run_really, run_script
from tiny import ends_with_one_line

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SHORT = (
    "--max_train_samples 768 --max_eval_samples 250 --per_device_eval_batch_size 125 --width 8 --logging_steps "
    "10 --disable_tqdm 1"
)
RECORD_KEYS = """
    study task dataset train_rows test_rows test_split model base slowmo exact_average workers processes
    sync_every outer_lr outer_momentum inner_optimizer inner_lr inner_state seed steps metrics curve rounds
    seconds bytes_sent_per_worker seconds_communicating command versions commit hardware changed_on_resume
    settings mixed_precision
"""


# ---- the job, as a user starts it ----


def run_recipe(output_dir: Path, flags: str, launcher: str | None = None):
    """What the program said, and its record. Without a `launcher` the fork server starts its two processes."""
    command = ["recipes/image/train.py", "--output_dir", str(output_dir), *flags.split()]
    said = run_script(command, 2, output_dir) if launcher is None else run_really(command, launcher)
    return said, json.loads((output_dir / "record.json").read_text())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Two workers, 24 steps, sync_every 5: 4 rounds, and an end inside the fifth."""
    folder = tmp_path_factory.mktemp("recipe")
    said, record = run_recipe(
        folder, f"{SHORT} --num_train_epochs 2 --sync_every 5 --plot --report_to tensorboard", ACCELERATE_LAUNCH
    )
    return folder, said, record


@pytest.mark.slow
def test_record_is_complete_and_right(short_run):
    folder, _, record = short_run
    assert set(record) == set(RECORD_KEYS.split())
    assert not (folder / "record.tmp").exists()
    assert (record["workers"], record["base"], record["slowmo"], record["outer_momentum"]) == (
        2,
        "local_sgd",
        True,
        0.5,
    )
    assert (record["train_rows"], record["test_rows"], record["test_split"]) == (768, 250, "test")
    assert (record["inner_optimizer"], record["inner_lr"]) == ("SGD", 0.1)
    assert record["mixed_precision"] == "no"
    told = ("per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "weight_decay", "width", "sync_every")
    assert [record["settings"][name] for name in told] == [32, "cosine", 0.1, 5e-4, 8, 5]
    assert record["steps"] == 2 * 768 // (2 * 32) == 24
    assert record["rounds"] == record["steps"] // record["sync_every"] == 4
    assert [point["step"] for point in record["curve"]] == [12, 24]
    assert record["curve"][-1]["test_accuracy"] == record["metrics"]["test_accuracy"]
    assert 0 < record["seconds_communicating"] < record["seconds"]


@pytest.mark.slow
def test_record_counts_every_round_s_bytes(short_run):
    """
    Two workers in a ring send their payload once: fp32 parameters and BatchNorm statistics, and at most 1 KiB per
    round.
    """
    folder, _, record = short_run
    model = AutoModelForImageClassification.from_pretrained(folder)
    floats = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    payload = 4 * sum(tensor.numel() for tensor in floats)
    assert record["rounds"] * payload <= record["bytes_sent_per_worker"] <= record["rounds"] * (payload + 1024)


@pytest.mark.slow
def test_saved_model_has_the_recorded_accuracy(short_run):
    folder, _, record = short_run
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    sets = load_images(None, max_train_samples=768, max_eval_samples=250)
    batch = Batch(*pixels.mean_and_std(pixels.make_dataset(sets.train, sets, seed=0)))
    rows = pixels.make_dataset(sets.test, sets)
    right = 0
    for start in (0, 125):
        inputs = batch([rows[index] for index in range(start, start + 125)])
        with torch.no_grad():
            right += int((model(inputs["pixel_values"]).logits.argmax(-1) == inputs["labels"]).sum())
    assert right / 250 == record["metrics"]["test_accuracy"]
    assert model.config.id2label[9] == "Ankle boot"


@pytest.mark.slow
def test_table_plot_and_tensorboard(short_run):
    folder, said, record = short_run
    assert f"accuracy of the average {record['metrics']['test_accuracy']:.4f}" in said
    assert f"bytes sent per worker   {record['bytes_sent_per_worker']:,}" in said
    assert "rounds                  4" in said
    assert "Warning" not in said, said
    with Image.open(folder / "training.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    events = list(folder.glob("runs/*/events.out.tfevents.*"))
    assert events
    assert all(path.stat().st_size > 0 for path in events)


@pytest.mark.slow
def test_the_baseline_is_one_flag_away(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --base all_reduce --outer_momentum 0 --plot")
    assert "slow momentum is off: this is all-reduce" in said
    assert (record["workers"], record["base"], record["slowmo"], record["rounds"], record["steps"]) == (
        2,
        "all_reduce",
        False,
        0,
        3,
    )
    assert record["bytes_sent_per_worker"] is None
    assert (tmp_path / "training.png").exists()


@pytest.mark.slow
def test_one_process_says_that_nothing_is_averaged(tmp_path):
    said, record = run_recipe(tmp_path, f"{SHORT} --max_steps 3 --sync_every 2", launcher="")
    assert "one worker: nothing is averaged" in said
    assert (record["workers"], record["rounds"], record["bytes_sent_per_worker"]) == (1, 1, 0)


@pytest.mark.slow
def test_class_folders_and_another_optimizer(tmp_path):
    """
    An ImageNet-like folder of small images, tested on val, with Trainer's AdamW: said once for two workers, and
    recorded.
    """
    folder = write_images(tmp_path / "images", {"train/cat": 20, "train/dog": 20, "val/cat": 2, "val/dog": 2})
    flags = (
        f"--dataset_name {folder} --optim adamw_torch --learning_rate 1e-3 --width 8 --max_steps 3 --sync_every "
        "2 --disable_tqdm 1"
    )
    said, record = run_recipe(tmp_path / "out", f"{flags} --per_device_train_batch_size 8")
    assert said.count("test_split was not given: the test images are those of 'val'") == 1
    assert (record["dataset"], record["train_rows"], record["test_rows"], record["test_split"]) == (
        folder,
        40,
        4,
        "val",
    )
    assert (record["inner_optimizer"], record["inner_lr"], record["rounds"]) == ("AdamW", 1e-3, 1)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "cat", 1: "dog"}


def test_flags_are_the_config_s_fields():
    flags = (
        "--sync_every 7 --outer_momentum 0.25 --outer_lr 0.5 --inner_state average --model_buffers local "
        "--learning_rate 0.3"
    )
    script, config, args = recipe.parse(flags.split())
    assert (config.sync_every, config.outer_momentum, config.outer_lr) == (7, 0.25, 0.5)
    assert (config.inner_state, config.model_buffers, args.learning_rate) == ("average", "local", 0.3)
    assert script.dataset_name is None


def test_defaults_meet_at_logs():
    """Logging gathers the loss of all ranks: by default only where they meet anyway. Slow momentum is on."""
    _, config, args = recipe.parse([])
    assert args.logging_steps % config.sync_every == 0
    assert config.outer_momentum == 0.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--load_best_model_at_end 1 --save_strategy epoch", "the best checkpoint is chosen by the test images"),
        (
            "--decay_epochs 100 150 --num_train_epochs 20",
            "the learning rate never falls: decay_epochs=[100, 150]",
        ),
        ("--decay_epochs 10 --num_train_epochs 20", ""),
    ],
)
def test_what_a_figure_would_hide_is_said(tmp_path, capsys, flags, said):
    script, _, args = recipe.parse(["--output_dir", str(tmp_path), *flags.split()])
    usual = SimpleNamespace(test_split="test", image_column="image", label_column="label")
    recipe.print_choices(script, args, usual)
    assert capsys.readouterr().out.startswith(said)
    assert said or not capsys.readouterr().out


def test_wrong_flag_ends_with_one_line():
    with pytest.raises(SystemExit, match=r"^train.py: sync_every must be >= 1 optimizer step, got 0"):
        recipe.parse(["--sync_every", "0"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--optim adma", r"adma is not a valid OptimizerNames, please select one of \['adamw_torch', .*'sgd', "),
        (
            "--optim_args momentum=0.5",
            "optim_args is for other optimizers than sgd, got 'momentum=0.5'. Use --inner_momentum",
        ),
        (
            "--optim rmsprop --optim_args alpha",
            "optim_args must be name=value, several of them with commas between, got 'alpha'",
        ),
        (
            "--optim adamw_torch --inner_momentum 0.5",
            "inner_momentum is for --optim sgd, got 0.5 with --optim adamw_torch",
        ),
        ("--optim adamw_torch --adam_beta1 2", "Invalid beta parameter at index 0: 2.0"),
        ("--optim galore_adamw", "You need to install `galore_torch` in order to use GaLore"),
        (
            "--decay_epochs 1 --lr_scheduler_type linear",
            r"lr_scheduler_type has no effect with decay_epochs=\[1\], got 'linear': .*Leave --lr_scheduler_type out",
        ),
        ("--decay_epochs 1 --warmup_steps 5", r"warmup_steps has no effect with decay_epochs=\[1\], got '5"),
        ("--prediction_loss_only 1", "prediction_loss_only must be false, got True: the test counts right answers."),
        ("--weight_decay -1", "Invalid weight_decay value: -1.0"),
        ("--report_to nonsense", "nonsense is not supported, only "),
        ("--width 0", "width must be >= 1 channel, got 0. Set --width."),
        (
            "--width 9 --architecture resnet18",
            "width is of the small ResNet, got 9 with another, whose stem has 64 channels",
        ),
        (
            "--dataloader_drop_last 1 --per_device_train_batch_size 65",
            r"dataloader_drop_last must be false with fewer .*, got 64 rows and per_device_train_batch_size=65\. Set",
        ),
        ("--max_train_samples 1", r"label_column must hold two classes or more, .* alone\. .*--max_train_samples"),
        ("--sync_every often", "argument --sync_every.*: invalid int value: 'often'"),
        ("--no_such_flag 1", r"Some specified arguments are not used .* \['--no_such_flag', '1'\]"),
        ("--dataset_name /no/such/folder", "dataset_name must be .* got '/no/such/folder', which is no folder"),
        ("--max_eval_samples 0", "max_eval_samples must be >= 1 row, got 0"),
    ],
)
def test_wrong_value_ends_with_one_line(tmp_path, monkeypatch, capfd, flags, said):
    """Nothing else is said, no traceback and no usage; Python's exit code for a text is 1."""
    shown = f"--output_dir {tmp_path} --use_cpu 1 --width 4 --max_train_samples 64 --max_eval_samples 8"
    ends_with_one_line(recipe, shown, flags, said, monkeypatch, capfd)


def test_an_error_of_many_lines_ends_as_one():
    with pytest.raises(SystemExit, match=r"^train.py: no such column: - image - label$"):
        recipe.end(ValueError("no such column:\n  - image\n  - label\n"))


# ---- launching ----


@pytest.mark.parametrize(
    ("name", "machines", "cpu"),
    [("cpu_two_processes", 1, True), ("one_machine_gpus", 1, False), ("several_machines", 2, False)],
)
def test_launch_configs(name, machines, cpu):
    config = ClusterConfig.from_yaml_file(yaml_file=str(RECIPES / "configs" / f"{name}.yaml"))
    assert config.distributed_type.value == "MULTI_GPU"
    assert (config.num_machines, config.use_cpu) == (machines, cpu)
    assert config.num_processes >= 2
    assert (config.main_process_ip is not None) == (machines > 1)


def test_the_launch_config_of_sharded_machines(monkeypatch):
    """What its processes read of it: FSDP of version 2, and shards that are a machine's processes."""
    ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)  # by a run beside the tests
    path = str(RECIPES / "configs" / "sharded_machines.yaml")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    monkeypatch.setattr(os, "environ", {**os.environ, **prepare_multi_gpu_env(args)})
    parallelism, plugin = ParallelismConfig(), FullyShardedDataParallelPlugin()
    assert (parallelism.dp_shard_size, parallelism.dp_replicate_size) == (8, 2)
    assert args.num_processes == 16 == parallelism.dp_shard_size * args.num_machines
    assert plugin.fsdp_version == 2
    assert "SHARDED" in str(plugin.state_dict_type)


# srun runs until its tasks are signalled, as they are by scancel; sent TERM itself it would kill them (seen with SLURM
# 22.05).
SLURM = {
    "srun": 'echo $$ > "$HERE/srun"; trap "echo srun ends >> $HERE/log; exit 75" USR2; while true; do sleep 0.1; done',
    "scancel": 'echo "scancel $*" >> "$HERE/log"; kill -USR2 "$(cat "$HERE/srun")"',
    "scontrol": 'echo "scontrol $*" >> "$HERE/log"; echo node-a',
}


@pytest.mark.parametrize("name", ["image_classification", "translation"])
def test_slurm_script_signals_its_tasks_waits_for_them_and_asks_for_a_requeue(tmp_path, name):
    """
    Five minutes before the end SLURM sends the script TERM: the tasks are told, save and end, and only then the job is
    requeued.
    """
    for program, script in SLURM.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-d]", "SLURM_NNODES": "4"}
    job = subprocess.Popen(["bash", str(RECIPES / "slurm" / f"{name}.sbatch")], env=environment)
    for _ in range(100):
        if (tmp_path / "srun").exists() and (tmp_path / "srun").read_text():
            break
        time.sleep(0.1)
    time.sleep(0.2)  # srun's trap is set
    job.terminate()
    assert job.wait(timeout=patience(20)) == 0
    assert (tmp_path / "log").read_text().splitlines()[1:] == [
        "scancel --signal=TERM 7.0",
        "srun ends",
        "scontrol requeue 7",
    ]


@pytest.mark.slow
def test_several_machines(tmp_path):
    """
    Two launchers with the shipped configuration, one per machine; here both are this machine, at its loopback address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--num_processes 2 --mixed_precision no --main_process_ip 127.0.0.1 --main_process_port {port}"
    commands = [
        f"{sys.executable} -m accelerate.commands.launch --config_file recipes/configs/several_machines.yaml "
        f"--machine_rank {rank} {flags} recipes/image/train.py {SHORT} --max_steps 4 --sync_every 2 "
        f"--output_dir {tmp_path}"
        for rank in (0, 1)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    launchers = [
        subprocess.Popen(
            command.split(), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        said = [launcher.communicate(timeout=patience(150))[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], said[0][-3000:] + said[1][-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["workers"], record["rounds"]) == (2, 2)
    assert "2 workers, one process each, on 2 machine(s)" in said[0]
    assert "accuracy of the average" not in said[1], "the second machine has no table of its own"
