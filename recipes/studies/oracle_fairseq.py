"""
The half of `oracle.py` that runs fairseq 0.12.2, the system of the paper's WMT'16 rows: what it computes on tiny
models and a few sentences, written to a folder for the other half to compare with. It wants an environment of its own,
on Python 3.11 or before, and nothing of this project:

    python -m venv ORACLE
    ORACLE/bin/pip install "pip<24.1" && ORACLE/bin/pip install torch==2.13.0 numpy
    ORACLE/bin/pip install omegaconf==2.0.6 hydra-core==1.0.7 cffi cython regex sacrebleu tqdm bitarray
    ORACLE/bin/pip install --no-deps fairseq==0.12.2
    ORACLE/bin/python recipes/studies/oracle_fairseq.py FOLDER
    python recipes/studies/oracle.py FOLDER                       # in this project's environment

What makes a package of 2022 run there, in the order met:

- pip below 24.1: later ones refuse the metadata of omegaconf 2.0.
- torch before all others, then fairseq without its requirements: these ask for torchaudio, which text does not need.
- `mend_dataclasses`: since Python 3.11 a dataclass cannot have a default that is not hashable, as those of fairseq and
  hydra-core are. They are made hashable while both are imported.
- `keep_float64` replaces its `softmax`, which casts to float32, where attention looks at the source; the loss's stays
  in float32, as ours is.
- `make_trainer` replaces the Trainer's `clip_grad_norm`: it asks for the norm in float32, which float64 gradients
  refuse. With the published `--clip-norm 0.0` it changes nothing; clipping is compared apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

SYMBOLS = 60  # beside fairseq's own four
SHAPES = {  # the structure of the two sizes, each an eighth or sixteenth as wide
    "big": ("transformer_vaswani_wmt_en_de_big", {"embed": 64, "ffn": 256, "heads": 16}),
    "base": ("transformer", {"embed": 32, "ffn": 128, "heads": 8}),
}
# examples/scaling_nmt of 0.12.2 (Ott et al., 2018), without --fp16.
PUBLISHED = """
    --share-all-embeddings --optimizer adam --adam-betas (0.9,0.98) --clip-norm 0.0 --lr-scheduler inverse_sqrt
    --warmup-init-lr 1e-07 --warmup-updates 4000 --lr 0.0005 --weight-decay 0.0
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 3584
"""
SCHEDULE_AT = (1, 100, 4000, 16_000)
UPDATES = 20  # of a trajectory, each of two micro-batches
LEARNED = 500  # updates until sentences are translated
ADAM_STEPS = 20


@contextmanager
def mend_dataclasses() -> Iterator[None]:
    """Dataclasses made inside have a hash, which Python 3.11 asks of defaults."""
    real = dataclasses.dataclass

    def dataclass(cls: Any = None, /, **settings: Any) -> Any:
        if cls is None:
            return lambda later: dataclass(later, **settings)
        foreign = cls.__module__.split(".")[0] in ("fairseq", "hydra")
        return real(cls, **{**settings, "unsafe_hash": True} if foreign else settings)

    dataclasses.dataclass = dataclass
    try:
        yield
    finally:
        dataclasses.dataclass = real


with mend_dataclasses():
    from fairseq import metrics, options, tasks, utils  # noqa: F401  tasks registers the translation task
    from fairseq.data import Dictionary, LanguagePairDataset, data_utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.optim import build_optimizer
    from fairseq.optim.lr_scheduler import build_lr_scheduler
    from fairseq.tasks.translation import TranslationTask
    from fairseq.trainer import Trainer


def main() -> None:
    """Write `tensors.pt` and `numbers.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="that is written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    keep_float64()
    torch.manual_seed(1)
    np.random.seed(1)
    words = Dictionary()
    for symbol in range(SYMBOLS):
        words.add_symbol(f"w{symbol}", n=SYMBOLS - symbol)
    pairs = sentences(words, 240)
    tensors: dict[str, Any] = {"pairs": pairs}
    numbers: dict[str, Any] = {"versions": versions(), "vocabulary": len(words), "updates": UPDATES}
    numbers["ids"] = {"pad": words.pad(), "eos": words.eos(), "bos": words.bos(), "unk": words.unk()}
    for size in SHAPES:
        told = forward(size, words, pairs[:8])
        tensors[size], numbers[size] = told
    tensors["average"] = beams_and_checkpoints(words, pairs, tensors, numbers)
    smoothing = 0.1 * (len(words) - 1) / len(words)
    for name, flags in (
        ("published", ""),
        ("aligned", f"--label-smoothing {smoothing!r} --warmup-init-lr 0 --adam-eps 1e-20"),
    ):
        tensors[name] = trajectory(words, pairs, flags.split())
    numbers["schedule"] = schedule(words)
    tensors["adam"] = adam(words)
    numbers["initial"] = {size: initial_deviations(size, words) for size in SHAPES}
    tensors["lengths"], numbers["batches"] = batches(words)
    torch.save(tensors, folder / "tensors.pt")
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
    print(f"written to {folder}")


def versions() -> dict[str, str]:
    """Of all that figures depend on."""
    names = ("fairseq", "torch", "numpy", "hydra-core", "omegaconf")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def sentences(words: Any, count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs to learn: the target is the source backwards, each word's successor; ends included."""
    generator = np.random.default_rng(7)
    first, last = words.nspecial, len(words) - 1
    made = []
    for _ in range(count):
        source = generator.integers(first, last, size=generator.integers(2, 11)).tolist()
        made.append(([*source, words.eos()], [*(token + 1 for token in reversed(source)), words.eos()]))
    return made


def keep_float64() -> None:
    """Attention in the precision of the model."""
    utils.softmax = lambda scores, dim, onnx_trace=False: torch.softmax(scores, dim)


# ---- fairseq's objects ----


def settings(size: str, *flags: str, real: bool = False) -> Any:
    """Its configuration as its command line gives it: the published flags, then `flags`."""
    arch, shape = SHAPES[size]
    tiny = [
        f"--{side}-{name}={value}"
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed-dim", shape["embed"]),
            ("ffn-embed-dim", shape["ffn"]),
            ("attention-heads", shape["heads"]),
        )
    ]
    line = ["nowhere", "--arch", arch, *PUBLISHED.split(), *([] if real else tiny), "--cpu", "--seed", "1", *flags]
    arguments = options.parse_args_and_arch(options.get_training_parser(default_task="translation"), line)
    return convert_namespace_to_omegaconf(arguments)


def parts(config: Any, words: Any) -> tuple[Any, Any, Any]:
    """Task, model and criterion."""
    config.task.source_lang, config.task.target_lang = "en", "de"
    task = TranslationTask(config.task, words, words)
    return task, task.build_model(config.model), task.build_criterion(config.criterion)


def sample_of(pairs: list[tuple[list[int], list[int]]], words: Any) -> dict[str, Any]:
    """A batch as it makes them: sorted by length, sources padded on the left."""
    sides = [[torch.tensor(pair[side]) for pair in pairs] for side in (0, 1)]
    sizes = [np.array([len(row) for row in side]) for side in sides]
    rows = LanguagePairDataset(sides[0], sizes[0], words, sides[1], sizes[1], words)
    return rows.collater([rows[index] for index in range(len(pairs))])


# ---- pieces ----


def forward(size: str, words: Any, pairs: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, logits, loss and gradients of a tiny model in float64 without dropout; its settings."""
    config = settings(size)
    _, model, criterion = parts(config, words)
    published = {name: getattr(config.model, name) for name in ("dropout", "attention_dropout", "activation_dropout")}
    _, model, criterion = parts(settings(size, "--dropout", "0"), words)
    model.double()
    sample = sample_of(pairs, words)
    loss, count, logged = criterion(model, sample)
    loss.backward()
    with torch.no_grad():
        logits = model(**sample["net_input"])[0]
    order = torch.argsort(sample["id"])
    with metrics.aggregate() as shown:
        criterion.reduce_metrics([logged])
    real = settings(size, real=True).model
    tensors = {
        "weights": dict(model.state_dict()),
        "positions": model.encoder.embed_positions.weights[: words.pad() + 1 + 64].clone(),
        "logits": logits[order],
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }
    numbers = {
        "loss": loss.item(),
        "nll": logged["nll_loss"].item(),
        "tokens": int(count),
        "shown": {name: float(shown[name].avg) for name in ("loss", "nll_loss")},
        "perplexity": float(utils.get_perplexity(shown["nll_loss"].avg, round=12)),
        "dropouts": published,
        "shape": {
            name: [getattr(real, f"{side}_{name}") for side in ("encoder", "decoder")]
            for name in ("embed_dim", "ffn_embed_dim", "attention_heads", "layers", "normalize_before", "learned_pos")
        },
        "activation": real.activation_fn,
    }
    return tensors, numbers


def make_trainer(words: Any, *flags: str) -> tuple[Any, Any, Any]:
    """Its Trainer, with a short schedule, dropout off, float64; model and task."""
    torch.manual_seed(3)
    config = settings("big", "--dropout", "0", "--lr", "0.001", "--warmup-updates", "10", *flags)
    task, model, criterion = parts(config, words)
    model.double()
    trainer = Trainer(config, task, model, criterion)
    trainer.clip_grad_norm = lambda _: torch.ones(())
    trainer.begin_epoch(1)
    return trainer, model, task


def trajectory(words: Any, pairs: list[Any], flags: list[str]) -> dict[str, Any]:
    """Parameters before and after some updates of two micro-batches of 4 and 8 pairs."""
    trainer, model, _ = make_trainer(words, *flags)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates = []
    for update in range(UPDATES):
        rows = pairs[12 * update : 12 * update + 12] if 12 * update + 12 <= len(pairs) else pairs[:12]
        rates.append(trainer.get_lr())
        trainer.train_step([sample_of(rows[:4], words), sample_of(rows[4:], words)])
    return {"before": before, "after": dict(model.state_dict()), "rates": rates}


def beams_and_checkpoints(
    words: Any, pairs: list[Any], tensors: dict[str, Any], numbers: dict[str, Any]
) -> list[dict[str, Any]]:
    """A model that has learned a little, its translations of batches of twenty, and its last five states."""
    trainer, model, task = make_trainer(words, "--lr", "0.004", "--warmup-updates", "100")
    generator = np.random.default_rng(11)
    kept = []
    for update in range(LEARNED):
        rows = [pairs[index] for index in generator.integers(len(pairs) // 2, len(pairs), size=32)]
        trainer.train_step([sample_of(rows, words)])
        if LEARNED - update <= 5:
            kept.append({name: value.clone() for name, value in model.state_dict().items()})
    # As many tokens as the recipe allows: the longest source and 50, with the first token and the end.
    search = task.build_generator([model], Namespace(beam=4, lenpen=0.6, max_len_a=1, max_len_b=48))
    numbers["beams"] = []
    for start in range(0, len(pairs), 20):
        sample = sample_of(pairs[start : start + 20], words)
        found = search.generate([model], sample)
        for place in torch.argsort(sample["id"]).tolist():
            beams = [{"tokens": beam["tokens"].tolist(), "score": beam["score"].item()} for beam in found[place]]
            numbers["beams"].append(beams)
    default = task.build_generator([model], Namespace())
    numbers["search"] = {name: getattr(default, name) for name in ("max_len_a", "max_len_b", "min_len", "unk_penalty")}
    tensors["learned"] = dict(model.state_dict())
    return kept


def schedule(words: Any) -> dict[str, float]:
    """The learning rate of some updates: each is set by the number of updates done before it."""
    config = settings("big")
    optimizer = build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    schedule = build_lr_scheduler(config.lr_scheduler, optimizer)
    return {str(update): schedule.step_update(update - 1) for update in SCHEDULE_AT}


def adam(words: Any) -> dict[str, Any]:
    """Its Adam on given gradients, of sizes from 1e-1 to 1e-9: parameters after every step, by weight decay."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(200, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-1, -9, 200, dtype=torch.float64)
    gradients = [scale * torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(ADAM_STEPS)]
    told: dict[str, Any] = {"start": start, "gradients": gradients, "scale": scale}
    for name, flags in (
        ("plain", []),
        ("no eps", ["--adam-eps", "1e-30"]),
        ("decay", ["--weight-decay", "0.01", "--adam-eps", "1e-30"]),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = build_optimizer(settings("big", *flags).optimizer, [parameter])
        steps = []
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            steps.append(parameter.detach().clone())
        told[name] = steps
    clipped = torch.nn.Parameter(start.float())
    clipped.grad = gradients[0].float()
    optimizer = build_optimizer(settings("big").optimizer, [clipped])
    told["norm"] = optimizer.clip_grad_norm(0.0)
    told["unclipped"] = clipped.grad.clone()
    optimizer.clip_grad_norm(0.01)
    told["clipped"] = clipped.grad.clone()
    return told


def initial_deviations(size: str, words: Any) -> dict[str, list[float]]:
    """Standard deviation of every tensor of a new model of the real size, by the last parts of its name."""
    torch.manual_seed(2)
    _, model, _ = parts(settings(size, real=True), words)
    kinds: dict[str, list[float]] = {}
    for name, value in model.named_parameters():
        kind = ".".join(name.split(".")[-2:])
        if value.ndim == 2 and kind.startswith("embed"):  # the row of padding is zero
            value = torch.cat([value[: words.pad()], value[words.pad() + 1 :]])
        kinds.setdefault(kind, []).append(value.std().item())
    return kinds


def batches(words: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Lengths that look like WMT's, and how many tokens a batch of them holds."""
    generator = np.random.default_rng(13)
    source = np.exp(generator.normal(3.2, 0.6, size=100_000))
    lengths = np.stack([source, source * np.exp(generator.normal(0.05, 0.2, size=source.size))], axis=1)
    lengths = np.clip(lengths.round(), 2, 250).astype(np.int64)
    np.random.seed(1)
    rows = LanguagePairDataset([], lengths[:, 0], words, [], lengths[:, 1], words, shuffle=True)
    rows.src, rows.tgt = lengths, lengths  # only their number is asked for
    order = rows.ordered_indices()
    made = data_utils.batch_by_size(
        order,
        rows.num_tokens,
        num_tokens_vec=rows.num_tokens_vec(order),
        max_tokens=3584,
        required_batch_size_multiple=settings("big").dataset.required_batch_size_multiple,
    )
    return torch.from_numpy(lengths), {
        "batches": len(made),
        "target_tokens": float(np.mean([lengths[batch, 1].sum() for batch in made])),
        "positions": float(np.mean([len(batch) * lengths[batch].max() for batch in made])),
        "target_positions": float(np.mean([len(batch) * lengths[batch, 1].max() for batch in made])),
    }


if __name__ == "__main__":
    main()
