"""Every program of examples/, run by the command that examples/README.md prints, and the notebook."""

from __future__ import annotations

import json
import math
import re
import shlex
import warnings
from collections import Counter

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DistributedSampler

from harness import patience, warnings_are_errors
from launcher import ACCELERATE_LAUNCH, PRINTED_LAUNCH, RECIPE_ENVIRONMENT, ROOT, run_really, run_script
from llama import letter_tokenizer, tiny_llama
from slowmo_hf import SlowMoConfig, SlowMoOptimizer, finish, run_in_process, verify_checkpoint

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "how_it_works.ipynb"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
HELP_TEXT = ROOT / "recipes" / "data" / "en_de_help"

# Runs a program as it is; behind it every rank leaves what its models hold, and what they held before `finish`.
WATCHED = """
import os, runpy, sys
import torch
import slowmo_hf

folder, *sys.argv = sys.argv[1:]
before, finish = [], slowmo_hf.finish


def watched(optimizer):
    before.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
    finish(optimizer)


slowmo_hf.finish = watched
names = runpy.run_path(sys.argv[0], run_name="__main__")
owner = names.get("trainer")
models = [names[name] for name in ("generator", "judge", "model") if name in names] if owner is None else [owner.model]
held = [[getattr(p.detach(), "_local_tensor", p.detach()) for p in model.parameters()] for model in models]
before = [[getattr(p, "_local_tensor", p) for p in of_one] for of_one in before]
torch.save({"held": held, "before": before}, f"{folder}/{os.environ['RANK']}.pt")
"""


def commands():
    """(program, processes, flags, the command's text) of every torchrun command that the README prints."""
    found = []
    for words in re.findall(r"OMP_NUM_THREADS=1 torchrun [^`\n]*", (EXAMPLES / "README.md").read_text()):
        _, _, option, processes, program, *flags = shlex.split(words)
        assert option == "--nproc-per-node"
        found.append((program.removeprefix("examples/"), int(processes), flags, words))
    return found


def command_of(program, resumed=False):
    """The only one of this program, without or with `--resume_from`."""
    (found,) = [c for c in commands() if c[0] == program and ("--resume_from" in c[2]) == resumed]
    return found


def run_example(program, folder, more=(), resumed=False):
    """What it printed, and what each rank held, of the README's command with `--output_dir` in `folder`."""
    _, processes, flags, _ = command_of(program, resumed)
    folder.mkdir(parents=True, exist_ok=True)
    watcher = folder / "watched.py"
    watcher.write_text(WATCHED)
    command = [str(watcher), str(folder), str(EXAMPLES / program), *flags, "--output_dir", str(folder / "out"), *more]
    said = run_script(command, processes, folder, {**RECIPE_ENVIRONMENT, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    assert_no_warning(said)
    return said, [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def assert_no_warning(said):
    found = [line for line in said.splitlines() if re.search(r"Warning: |^W\d{4} |were not passed", line)]
    assert [line for line in found if "gradient_checkpointing` is deprecated" not in line] == []  # TRL's: harness.py


def assert_all_equal(ranks, key="held"):
    for of_rank in ranks[1:]:
        for mine, first in zip(of_rank[key], ranks[0][key], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))


def assert_held_is_the_mean_before(ranks):
    """`finish` left the workers' average, and the workers differed: else the mean says nothing."""
    for place, of_first in enumerate(ranks[0]["before"]):
        differ = False
        for number in range(len(of_first)):
            workers = [rank["before"][place][number] for rank in ranks]
            differ |= not torch.equal(workers[0], workers[-1])
            mean = sum(worker.double() for worker in workers) / len(workers)
            for rank in ranks:
                torch.testing.assert_close(rank["held"][place][number].double(), mean, rtol=1e-6, atol=1e-7)
        assert differ


# ---- the page ----


def test_every_program_has_its_command_and_is_short():
    assert PROGRAMS == ["accelerate_loop.py", "fsdp.py", "gan.py", "sft_lora.py", "trainer_lm.py"]
    assert sorted({program for program, *_ in commands()}) == PROGRAMS
    for program in PROGRAMS:
        text = (EXAMPLES / program).read_text()
        assert len(text.splitlines()) < 80, program
        assert f"\n    {command_of(program)[3]}\n" in text, f"{program}: its docstring has another command"
    for program, _, flags, _ in commands():
        assert not flags or program == "accelerate_loop.py"


# ---- trainer_lm.py ----


def unigram_entropy():
    """Nats per byte of what `trainer_lm.py` learns, where nothing but each byte's frequency is known."""
    text = "\n".join(pair["en"] for pair in load_dataset(str(HELP_TEXT), split="train[:5000]")["translation"])
    counts = Counter(text.encode())
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


@pytest.mark.slow
def test_trainer_lm(tmp_path):
    """Better than bytes one by one; the saved model is the average that every rank holds, and it reloads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said, ranks = run_example("trainer_lm.py", tmp_path)
    assert_all_equal(ranks)
    loss = float(re.search(r"eval_loss\s*=\s*([\d.]+)", said).group(1))
    assert loss < unigram_entropy() - 0.4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), ranks[0]["held"][0], strict=True))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("The macro", return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [[byte + 3 for byte in b"The macro"] + [1]]


# ---- accelerate_loop.py ----


@pytest.mark.slow
def test_accelerate_loop_and_its_resume(tmp_path):
    """From the middle of an epoch bit for bit the run that was never stopped."""
    said, whole = run_example("accelerate_loop.py", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "out" / "step_200"
    verify_checkpoint(checkpoint)
    named = command_of("accelerate_loop.py", resumed=True)[2]
    assert named == ["--resume_from", "outputs/accelerate_loop/step_200"]
    again, resumed = run_example(
        "accelerate_loop.py", tmp_path / "resumed", ["--resume_from", str(checkpoint)], resumed=True
    )
    assert_all_equal([*whole, *resumed])
    assert epochs(said) == [0, 1]
    assert epochs(again) == [1]
    assert last_line(said) == last_line(again)
    assert float(last_line(said).split()[-1]) > 0.78  # ten classes, 0.1 by chance
    saved = load_file(tmp_path / "resumed" / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in zip(LAYERS, whole[0]["held"][0], strict=True))


LAYERS = ["0.weight", "0.bias", "3.weight", "3.bias"]


def epochs(said):
    return [int(number) for number in re.findall(r"^epoch (\d+): accuracy", said, re.MULTILINE)]


def last_line(said):
    return re.search(r"^final accuracy .*$", said, re.MULTILINE).group(0)


# ---- gan.py ----


@pytest.mark.slow
def test_gan(tmp_path):
    """Both models are averages; the saved generator's points lie around the whole ring."""
    _, ranks = run_example("gan.py", tmp_path)
    assert len(ranks[0]["held"]) == 2
    assert_all_equal(ranks)
    for rank in ranks:
        rank["before"].reverse()  # the judge is finished first
    assert_held_is_the_mean_before(ranks)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    network.load_state_dict(load_file(tmp_path / "out" / "generator" / "model.safetensors"))
    with torch.no_grad():
        points = network(torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
    assert points.norm(dim=1).mean().item() == pytest.approx(2, abs=0.2)
    assert points.norm(dim=1).std() < 0.4
    eighths = ((torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)) % 8).long()
    assert torch.bincount(eighths, minlength=8).min() > 2000 / 8 / 4


# ---- fsdp.py ----


def whole_models():
    """`fsdp.py` without shards: two workers in this process, each of whose batches is what its two ranks have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = "\n".join(p["en"] for p in load_dataset(str(HELP_TEXT), split="train[:4000]")["translation"]).encode()
    blocks = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
    order = [list(DistributedSampler(blocks, 4, rank, seed=0)) for rank in range(4)]
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

    def work(worker):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
        optimizer = SlowMoOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-3), SlowMoConfig(sync_every=12))
        for step in range(50):
            rows = [i for rank in (2 * worker, 2 * worker + 1) for i in order[rank][8 * step : 8 * step + 8]]
            model(input_ids=blocks[rows], labels=blocks[rows]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finish(optimizer)
        return model

    return run_in_process(work, 2)[0]


@pytest.mark.slow
def test_fsdp(tmp_path):
    """What workers with whole models do; a rank holds half of the parameters, its counterpart the same."""
    from transformers import AutoModelForCausalLM

    said, ranks = run_example("fsdp.py", tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for rank in range(4):
        assert 2 * sum(p.numel() for p in ranks[rank]["held"][0]) == sum(p.numel() for p in saved.parameters())
    for shard in (0, 1):
        counterparts = ranks[shard::2]
        assert_all_equal(counterparts)
        assert_held_is_the_mean_before(counterparts)
        assert counterparts[0]["held"][0][0].shape == (128, 64)
    right = whole_models()
    for (name, mine), value in zip(saved.named_parameters(), right.parameters(), strict=True):
        assert (mine - value).norm() <= 1e-3 * value.norm(), name  # measured 4e-5; with beta 0.4 it is 0.2
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", said, re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2


# ---- sft_lora.py ----


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sft_lora(tmp_path):
    """The average of the adapters is saved and reloads; the base is what it was, and the loss falls."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    said, ranks = run_example("sft_lora.py", tmp_path)
    assert_all_equal(ranks)
    out = tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(out / "small_model")
    loaded = AutoPeftModelForCausalLM.from_pretrained(out, is_trainable=True)
    trained = dict(zip([name for name, _ in loaded.named_parameters()], ranks[0]["held"][0], strict=True))
    adapters = {name: value for name, value in trained.items() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 7  # two matrices for each of seven layers in two blocks
    assert all(torch.equal(value, trained[name]) for name, value in loaded.named_parameters())
    assert all(value.any() for value in adapters.values()), "B starts at zero"
    for name, value in base.named_parameters():
        (mine,) = [v for n, v in trained.items() if n.replace(".base_layer", "") == f"base_model.model.{name}"]
        assert torch.equal(mine, value), name
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", said)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    sent = re.search(r"([\d.]+) kB per worker and round of 4 steps", said)
    assert float(sent.group(1)) == pytest.approx(sum(v.numel() for v in adapters.values()) * 4 / 1000, rel=0.01)


# ---- a model and data of one's own ----


def own_model_and_data(folder):
    """(a folder with a model and its tokenizer, a folder with text)"""
    model, data = folder / "model", folder / "data"
    tiny_llama().save_pretrained(model)
    letter_tokenizer().save_pretrained(model)
    data.mkdir()
    rows = [json.dumps({"text": " ".join("abcdefghij"[row % 5 :] * 8)}) for row in range(600)]
    (data / "train.jsonl").write_text("\n".join(rows))
    return model, data


@pytest.mark.slow
@pytest.mark.parametrize("program", ["trainer_lm.py", "sft_lora.py"])
def test_a_model_and_data_of_ones_own(tmp_path, program):
    """`--model_name` and `--dataset_name`: with learning rate 0 what is saved is what was loaded."""
    model, data = own_model_and_data(tmp_path)
    flags = f"--model_name {model} --dataset_name {data} --learning_rate 0 --max_steps 5 --sync_every 2"
    _, ranks = run_example(program, tmp_path / "run", flags.split())
    assert_all_equal(ranks)
    given, out = load_file(model / "model.safetensors"), tmp_path / "run" / "out"
    if program == "trainer_lm.py":
        saved = load_file(out / "model.safetensors")
        assert saved.keys() == given.keys()
        assert all(torch.equal(saved[name], value) for name, value in given.items())
        return
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    saved = load_file(out / "adapter_model.safetensors")
    assert len(saved) == 2 * 7
    for name, value in saved.items():
        assert value.any() == ("lora_A" in name), "B starts at zero, and stays there"
        layer = given[name.removeprefix("base_model.model.").replace("lora_A.", "").replace("lora_B.", "")]
        assert value.shape == ((8, layer.shape[1]) if "lora_A" in name else (layer.shape[0], 8))


# ---- as a user types it ----


@pytest.mark.slow
def test_a_command_as_it_is_printed(tmp_path):
    """By torchrun itself; the shell's OMP_NUM_THREADS=1 is in the environment here too."""
    words = command_of("gan.py")[3]
    environment, launcher, *rest = shlex.split(words)
    assert (environment, launcher) == ("OMP_NUM_THREADS=1", "torchrun")
    assert RECIPE_ENVIRONMENT["OMP_NUM_THREADS"] == "1"
    check_short_gan(tmp_path, f"-m torch.distributed.run {shlex.join(rest)}")


@pytest.mark.slow
def test_accelerate_launch_as_it_is_printed(tmp_path):
    words = re.search(r"`accelerate launch (--config_file [^`]*)`", (EXAMPLES / "README.md").read_text()).group(1)
    assert f"{PRINTED_LAUNCH} examples/gan.py" == f"-m accelerate.commands.launch {words}"
    check_short_gan(tmp_path, f"{ACCELERATE_LAUNCH} examples/gan.py")


def check_short_gan(folder, command):
    said = run_really(["--output_dir", str(folder), "--steps", "24"], command)
    assert_no_warning(said)
    assert said.count("the model is the average of 2 workers at step 24") == 2, "models"
    assert load_file(folder / "judge" / "model.safetensors").keys() == {f"{i}.{n}" for i in (0, 2, 4) for n in KINDS}


KINDS = ("weight", "bias")


# ---- the notebook ----

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


def said_by(notebook):
    """What its cells have printed, without the libraries' words on stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]


@pytest.fixture(scope="module")
def notebook():
    """(what it prints now, what is committed)"""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    with warnings.catch_warnings():
        warnings_are_errors()
        found = nbformat.read(NOTEBOOK, as_version=4)
        committed = said_by(found)
        folder = {"metadata": {"path": str(EXAMPLES)}}
        client = nbclient.NotebookClient(found, timeout=patience(60), kernel_name="python3", resources=folder)
        client.execute(env=RECIPE_ENVIRONMENT)
    return said_by(found), committed


@pytest.mark.slow
def test_the_notebook_prints_what_is_committed(notebook):
    """In the same words, with the same numbers but for rounding; its pictures are small."""
    now, committed = notebook
    assert re.sub(NUMBER, "#", now) == re.sub(NUMBER, "#", committed)
    assert numbers(now) == pytest.approx(numbers(committed), rel=0.02, abs=1e-12)
    assert len(numbers(committed)) > 50
    assert NOTEBOOK.stat().st_size < 300_000


def after(said, words):
    """The numbers of the only line that begins so, behind these words."""
    (line,) = [line for line in said.splitlines() if line.startswith(words)]
    return numbers(line.removeprefix(words))


@pytest.mark.slow
def test_the_notebooks_claims(notebook):
    """Each against what theory says."""
    said, _ = notebook
    spread = (1 - 0.9**7) * 3, 0.0  # seven steps alone; the eighth meets
    assert after(said, "spread of the workers before the first average:") == pytest.approx(spread, abs=1e-3)
    assert after(said, "their weight after 4 rounds:") == pytest.approx([2.5 * (1 - 0.9**32)] * 2, abs=1e-4)
    assert after(said, "ratio:") == pytest.approx([8], rel=0.01)
    assert said.count("agree within 1e-12: True") == 3
    assert after(said, "largest difference between beta 0 and averaging:") == [0.0]
    for beta in (0.0, 0.5, 0.8):
        moved = f"beta {beta}: on a constant slope a round moves"
        assert after(said, moved) == pytest.approx([1 / (1 - beta)], rel=1e-3)
    rounds = [int(n) for n in re.findall(r"^beta [\d.]+: (\d+) rounds to a tenth", said, re.MULTILINE)]
    assert rounds[0] == math.ceil(math.log(0.1) / (12 * math.log(1 - 0.1 * 0.01)))  # the flat direction's own pace
    assert rounds[1] == pytest.approx(rounds[0] / 2, rel=0.05)
    assert rounds[2] < rounds[0] / 5
    for workers, beta in ((1, 0.0), (4, 0.0), (4, 0.5)):
        measured, theory = after(said, f"{workers} worker(s), beta {beta}: variance")
        assert measured == pytest.approx(theory, rel=0.05)  # 20,000 weights: 1 %, five times
    exponential = after(said, "exponential: largest distance from the average:")
    assert exponential == [3.5, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    ring = after(said, "ring: largest distance from the average:")
    assert ring[0] == 3.5
    assert ring[-1] > 1
    for topology in ("exponential", "ring"):
        assert after(said, f"{topology}: sum of all workers after every exchange:") == [28.0] * 7
