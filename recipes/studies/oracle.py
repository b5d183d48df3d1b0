"""
The translation recipe beside fairseq 0.12.2, the system of the paper's WMT'16 rows, piece by piece: one table, a row
a piece, "equal to N digits" or "different: why". `oracle_fairseq.py` has run before in an environment of its own (it
says how to make it) and left a folder:

    ORACLE/bin/python recipes/studies/oracle_fairseq.py FOLDER
    python recipes/studies/oracle.py FOLDER --record recipes/records/translation/oracle.json

Models are tiny, with the structure of `big` and `base`: copied weights, equal tokens, no dropout, float64. Digits are
those of the largest difference over the largest value; both take the loss in float32, which leaves 6 or 7.

Where the two differ on purpose, the difference is taken out of a comparison to see whether anything else is left: then
the model gets fairseq's positions and starts with `</s>`, as the row of each says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import MarianMTModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, whose folders share modules

from records import environment, write_record
from translation.model import (
    MODEL_SIZES,
    average_checkpoints,
    beam_settings,
    generate,
    make_transformer,
    smoothed_loss,
)
from translation.tokens import EOS, TokenBatches, collate
from translation.train import RecipeTrainingArguments, parse
from translation.trainer import TranslationTrainer

TINY = {"big": {"d_model": 64, "ffn": 256}, "base": {"d_model": 32, "ffn": 128}}
EPSILON = 0.1  # label smoothing
PROCESSES = 64  # of the paper


def main() -> None:
    """Compare, print the table, and write it down where `--record` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what oracle_fairseq.py wrote")
    parser.add_argument("--record", type=Path, help="a JSON file to write the table to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    numbers = json.loads((asked.folder / "numbers.json").read_text())
    rows = Oracle(numbers, torch.load(asked.folder / "tensors.pt", weights_only=True)).rows()
    record = {"study": "oracle", "task": "translation", "rows": rows, "theirs": numbers["versions"]}
    record |= environment([datasets])
    print(table(record))
    if asked.record:
        write_record(record, asked.record)


def table(record: dict[str, Any]) -> str:
    """A row a piece."""
    lines = ["| piece | against fairseq 0.12.2 |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row['piece']} | {row['verdict']} |" for row in record["rows"])])


def digits(ours: torch.Tensor | float, theirs: torch.Tensor | float) -> int:
    """In which two tensors agree: of the largest difference, over the largest value."""
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    difference = (first - second).abs().max() / second.abs().max()
    return 15 if difference == 0 else max(0, min(15, math.floor(-math.log10(difference.item()))))


def row(
    piece: str, *, digits: int | None = None, note: str = "", different: str = "", **figures: Any
) -> dict[str, Any]:
    """Of the table: a difference where there is one, how many digits are equal, and the figures behind both."""
    same = f"equal to {digits} digits" if digits is not None else "" if different else "equal"
    words = [f"different: {different}" if different else "", f"{same}{note}"]
    verdict = "; ".join(word for word in words if word)
    return {"piece": piece, "digits": digits, "different": bool(different), "verdict": verdict, **figures}


class FixedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of rows that were given, in place of `TokenBatches`."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """There is one order."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Oracle:
    """
    What fairseq computed, in this recipe's names and ids.

    Args:
        numbers (`dict`), tensors (`dict`): As `oracle_fairseq.py` wrote them.
    """

    def __init__(self, numbers: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.numbers, self.tensors = numbers, tensors
        ids = numbers["ids"]
        # Whose place in fairseq's dictionary is where: ours has <pad> and </s> first.
        special = [ids["pad"], ids["eos"], ids["bos"], ids["unk"]]
        self.order = torch.tensor([*special, *range(len(special), numbers["vocabulary"])])
        self.ours_of = torch.argsort(self.order)
        self.pairs = [
            {"input_ids": self.ours_of[source].tolist(), "labels": self.ours_of[target].tolist()}
            for source, target in (map(torch.tensor, pair) for pair in tensors["pairs"])
        ]

    def rows(self) -> list[dict[str, Any]]:
        """All that is compared."""
        return [
            *self.shapes(),
            *self.forward(),
            self.positions(),
            row("first token of a translation", different="`<pad>` (Marian), there `</s>`"),
            *self.initial(),
            *self.optimizer(),
            *self.trajectories(),
            *self.batches(),
            *self.beams(),
            self.average(),
        ]

    # ---- models ----

    def model(self, size: str, weights: dict[str, torch.Tensor]) -> MarianMTModel:
        """A tiny one of the size's structure, with fairseq's weights and positions."""
        MODEL_SIZES["oracle"] = {**MODEL_SIZES[size], **TINY[size], "dropout": 0.0}
        model = make_transformer("oracle", self.numbers["vocabulary"]).double()
        del MODEL_SIZES["oracle"]
        state = self.state(weights)
        missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - set(state)
        assert not missing, missing
        model.load_state_dict(state, strict=False)
        table = self.tensors[size]["positions"][self.numbers["ids"]["pad"] + 1 :]
        for side in (model.model.encoder, model.model.decoder):
            side.embed_positions.weight.data[: len(table)] = table
        return model

    def state(self, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        fairseq's tensors by our names; its encoder layers hold a second, empty copy of each for inference, which is
        left out.
        """
        kinds = (
            "proj.weight",
            "proj.bias",
            "fc1.weight",
            "fc1.bias",
            "fc2.weight",
            "fc2.bias",
            "norm.weight",
            "norm.bias",
        )
        made = {f"model.{name}": value for name, value in theirs.items() if name.endswith(kinds)}
        return {**made, "model.shared.weight": theirs["encoder.embed_tokens.weight"][self.order]}

    @staticmethod
    def batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The recipe's, but that a translation starts with `</s>`."""
        made = collate(rows)
        made["decoder_input_ids"][:, 0] = EOS
        return made

    # ---- the model ----

    def shapes(self) -> list[dict[str, Any]]:
        """What the registered architectures say against `MODEL_SIZES`."""
        made = []
        for size in TINY:
            ours, theirs = MODEL_SIZES[size], self.numbers[size]
            shape = {
                "embed_dim": ours["d_model"],
                "ffn_embed_dim": ours["ffn"],
                "attention_heads": ours["heads"],
                "layers": ours["layers"],
                "normalize_before": False,
                "learned_pos": False,
            }
            dropouts = {"dropout": ours["dropout"], "attention_dropout": 0.0, "activation_dropout": 0.0}
            config = make_transformer("mini", 300).config
            assert (config.attention_dropout, config.activation_dropout) == (0.0, 0.0)
            assert theirs["activation"] == config.activation_function
            same = theirs["shape"] == {name: [value] * 2 for name, value in shape.items()}
            same = same and theirs["dropouts"] == dropouts
            words = f"{ours['layers']} layers, {ours['d_model']} wide, {ours['ffn']} inside, {ours['heads']} heads"
            made.append(row(f"{size}: {words}, dropout {ours['dropout']}", different="" if same else str(theirs)))
        return made

    def forward(self) -> list[dict[str, Any]]:
        """Logits, losses and gradients of eight pairs."""
        made = []
        vocabulary = self.numbers["vocabulary"]
        for size in TINY:
            theirs, told = self.tensors[size], self.numbers[size]
            model = self.model(size, theirs["weights"])
            batch = self.batch(self.pairs[:8])
            labels = batch.pop("labels")
            outputs = model(**batch, use_cache=False)
            held = labels >= 0
            same = digits(outputs.logits[held], theirs["logits"][..., self.order][held])
            made.append(row(f"{size}: logits", digits=same))
            # fairseq spreads epsilon over the V - 1 other tokens, torch over all V.
            loss = smoothed_loss(outputs, labels, label_smoothing=EPSILON * vocabulary / (vocabulary - 1))
            loss.backward()
            nll = smoothed_loss(outputs, labels, label_smoothing=0.0).item()
            assert told["tokens"] == int(held.sum())
            made.append(
                row(
                    f"{size}: NLL per target token, in bits",
                    digits=digits(nll / math.log(2), told["shown"]["nll_loss"]),
                    note=" (nats over log 2)",
                )
            )
            assert math.isclose(told["perplexity"], 2 ** told["shown"]["nll_loss"], rel_tol=1e-5)
            made.append(
                row(
                    f"{size}: label-smoothed loss per target token",
                    different="ε over V tokens as in 0.9.0, there over V - 1",
                    digits=digits(loss.detach(), told["loss"] / told["tokens"]),
                    note=" with ε V / (V - 1)",
                )
            )
            made.append(row(f"{size}: gradient of every parameter", digits=self.gradients(model, theirs, told)))
        return made

    def gradients(self, model: MarianMTModel, theirs: dict[str, Any], told: dict[str, Any]) -> int:
        """
        Digits of the worst parameter. A key's bias moves no softmax: its gradient is rounding on both sides, and only
        has to be small.
        """
        expected = self.state(theirs["gradients"])
        largest = max(value.abs().max() for value in expected.values())
        worst = 15
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad * told["tokens"]
            if name.endswith("k_proj.bias"):
                assert max(gradient.abs().max(), expected[name].abs().max()) < 1e-6 * largest, name
            else:
                worst = min(worst, digits(gradient, expected[name]))
        return worst

    def positions(self) -> dict[str, Any]:
        """Sines and cosines."""
        d = TINY["big"]["d_model"]
        theirs = self.tensors["big"]["positions"]
        place = torch.arange(len(theirs), dtype=torch.float64)[:, None]
        angles = place * 10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2 - 1))
        expected = torch.cat([angles.sin(), angles.cos()], dim=1)
        expected[self.numbers["ids"]["pad"]] = 0
        assert digits(expected, theirs) >= 5
        return row(
            "sinusoidal positions",
            different="10,000^(-2i/d) from 0 (Vaswani et al.), there 10,000^(-i/(d/2 - 1)) from 2",
        )

    def initial(self) -> list[dict[str, Any]]:
        """Standard deviations at the real size of big."""
        torch.manual_seed(0)
        model = make_transformer("big", 1000)
        kinds: dict[str, list[torch.Tensor]] = {}
        for name, value in model.named_parameters():
            if value.requires_grad:
                kinds.setdefault(".".join(name.split(".")[-2:]), []).append(value.detach())
        made = []
        for kind, their_kind, words in (
            ("shared.weight", "embed_tokens.weight", "embeddings"),
            ("q_proj.weight", "q_proj.weight", "queries"),
            ("k_proj.weight", "k_proj.weight", "keys"),
            ("v_proj.weight", "v_proj.weight", "values"),
            ("out_proj.weight", "out_proj.weight", "attention's output"),
            ("fc1.weight", "fc1.weight", "first of the feed-forward layer"),
            ("fc2.weight", "fc2.weight", "second of the feed-forward layer"),
        ):
            values = [value[1:] if kind == "shared.weight" else value for value in kinds[kind]]
            ours = sum(value.std().item() for value in values) / len(values)
            theirs = sum(self.numbers["initial"][their_kind]) / len(self.numbers["initial"][their_kind])
            same = abs(ours / theirs - 1) < 0.02
            why = "" if same else f"{ours:.4f}, Glorot's as in fairseq 0.9.0; there {theirs:.4f}, torch's own"
            note = f" within sampling: {ours:.4f} and {theirs:.4f}" if same else ""
            made.append(row(f"big: initial sd of {words}", different=why, note=note, ours=ours, theirs=theirs))
        biases = [values for kind, values in kinds.items() if kind.endswith("bias")]
        assert all(not value.any() for values in biases for value in values)
        made.append(
            row(
                "big: initial biases",
                different="0, as in fairseq 0.9.0; there torch's own, but for attention's output",
            )
        )
        return made

    # ---- training ----

    def settings(self, folder: str, flags: str = "") -> RecipeTrainingArguments:
        """Of the paper's AR-Adam row."""
        shown = (
            f"--preset wmt16 --base all_reduce --outer_momentum 0 --use_cpu 1 --output_dir {folder} --disable_tqdm 1"
        )
        quiet = "--eval_strategy no --save_strategy no --average_checkpoints 1 --logging_strategy no"
        return parse(f"{shown} {quiet} --dataloader_num_workers 0 {flags}".split())[2]

    def trainer(self, model: MarianMTModel, args: RecipeTrainingArguments) -> TranslationTrainer:
        """The recipe's, on the pairs, in the order that fairseq had them."""
        made = TranslationTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(self.pairs),
            max_tokens=3584,
            length_penalty=0.6,
            target_lang="de",
        )
        count, batches = len(self.pairs), []
        for update in range(self.numbers["updates"]):
            start = 12 * update if 12 * update + 12 <= count else 0
            batches += [list(range(start, start + 4)), list(range(start + 4, start + 12))]
        made.token_batches = FixedBatches(batches)
        made.data_collator = self.batch
        return made

    def optimizer(self) -> list[dict[str, Any]]:
        """Schedule, Adam, clipping."""
        told = self.tensors["adam"]
        with tempfile.TemporaryDirectory() as folder:
            args = self.settings(folder)
            trainer = self.trainer(self.model("base", self.tensors["base"]["weights"]), args)
            trainer.create_optimizer()
            factor = trainer.create_scheduler(num_training_steps=100_000).lr_lambdas[0]
            made = []
            for update, theirs in self.numbers["schedule"].items():
                ours = args.learning_rate * factor(int(update) - 1)
                far, same = f"{ours:.4g}, there {theirs:.4g}: warm-up starts at 0, not at 1e-7", digits(ours, theirs)
                told_by = {"digits": same} if same >= 6 else {"different": far}
                made.append(row(f"learning rate of update {int(update):,}", **told_by, ours=ours, theirs=theirs))
            kind, chosen = TranslationTrainer.get_optimizer_cls_and_kwargs(args)

        def steps(**others: float) -> list[torch.Tensor]:
            parameter = torch.nn.Parameter(told["start"].clone())
            adam = kind([parameter], **{**chosen, "weight_decay": args.weight_decay, **others})
            seen = []
            for gradient in told["gradients"]:
                parameter.grad = gradient.clone()
                adam.step()
                seen.append(parameter.detach().clone())
            return seen

        def moved(seen: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(seen) - told["start"]

        ours, theirs, size = moved(steps()), moved(told["plain"]), told["scale"]
        far = [
            ((ours - theirs)[-1, at].norm() / theirs[-1, at].norm()).item()
            for at in ((size > least / 3) & (size < least * 3) for least in (1e-3, 1e-5, 1e-7))
        ]
        made.append(
            row(
                f"Adam: {len(ours)} updates, given gradients",
                different="eps is added after the bias correction, there before",
                further=dict(zip(("at 1e-3", "at 1e-5", "at 1e-7"), far, strict=True)),
                digits=digits(moved(steps(eps=1e-30)), moved(told["no eps"])),
                note=" without eps",
            )
        )
        made.append(
            row(
                "Adam: weight decay 0.01 (the paper has none)",
                digits=digits(moved(steps(eps=1e-30, weight_decay=0.01)), moved(told["decay"])),
                note=" without eps",
            )
        )
        clipped = torch.nn.Parameter(told["start"].float())
        clipped.grad = told["gradients"][0].float()
        assert args.max_grad_norm == 0.0
        assert torch.equal(told["unclipped"], clipped.grad)
        torch.nn.utils.clip_grad_norm_([clipped], 0.01)
        made.append(
            row(
                "clipping: off, at --clip-norm 0.0 and max_grad_norm 0",
                digits=digits(clipped.grad, told["clipped"]),
                note=" where it is on",
            )
        )
        return made

    def trajectories(self) -> list[dict[str, Any]]:
        """Updates of two micro-batches of unequal size, by each system's own Trainer."""
        found = {}
        for name, flags in (("published", ""), ("aligned", "--adam_epsilon 1e-20")):
            told = self.tensors[name]
            model = self.model("big", told["before"])
            with tempfile.TemporaryDirectory() as folder:
                updates = self.numbers["updates"]
                shown = f"--learning_rate 1e-3 --warmup_steps 10 --gradient_accumulation_steps 2 --max_steps {updates}"
                self.trainer(model, self.settings(folder, f"{shown} {flags}")).train()
            before, after = self.state(told["before"]), self.state(told["after"])
            moved = {
                key: (value.detach() - before[key], after[key] - before[key])
                for key, value in model.named_parameters()
                if value.requires_grad and not key.endswith("k_proj.bias")
            }
            ours, theirs = (torch.cat([both[side].flatten() for both in moved.values()]) for side in (0, 1))
            far = ((ours - theirs).norm() / theirs.norm()).item()
            found[name] = far, min(digits(*both) for both in moved.values())
        return [
            row(
                f"{self.numbers['updates']} updates by each Trainer: change of every parameter",
                different=f"by {found['published'][0]:.1%}, for smoothing (V = 64), eps and warm-up",
                digits=found["aligned"][1],
                note=" without these",
            ),
            row(
                "a local worker's gradient",
                different="divided by its own target tokens, there by the mean over all processes",
            ),
        ]

    # ---- batches ----

    def batches(self) -> list[dict[str, Any]]:
        """Tokens per update, of the same lengths."""
        lengths = self.tensors["lengths"].numpy()
        ours = TokenBatches(lengths, 3584, world_size=PROCESSES).tokens_per_update()
        theirs = {name: PROCESSES * self.numbers["batches"][name] for name in ("target_tokens", "target_positions")}
        return [
            row(
                "tokens per update: 64 batches of at most 3,584",
                different=f"{ours['target'] / 1000:.0f}k target tokens, there {theirs['target_tokens'] / 1000:.0f}k; "
                f"with padding {ours['target_padded'] / 1000:.0f}k and {theirs['target_positions'] / 1000:.0f}k",
                ours=ours,
                theirs=theirs,
            ),
            row("text", different="raw text, byte-level BPE; there tokenised and cleaned beforehand, BPE of words"),
            row("precision", different="bfloat16 where accelerate is told so, there float16"),
        ]

    # ---- translations ----

    @torch.no_grad()
    def beams(self) -> list[dict[str, Any]]:
        """Sentences in batches of twenty, all four translations of each."""
        model = self.model("big", self.tensors["learned"]).eval()
        model.generation_config.decoder_start_token_id = EOS
        ours, scores = [], []
        for start in range(0, len(self.pairs), 20):
            source = self.batch(self.pairs[start : start + 20])
            inputs = {name: source[name] for name in ("input_ids", "attention_mask")}
            made = model.generate(
                **inputs,
                **beam_settings(),
                max_length=source["input_ids"].shape[1] + 50,
                num_return_sequences=4,
                return_dict_in_generate=True,
                output_scores=True,
            )
            found = [tokens[: tokens.index(EOS) + 1] for tokens in made.sequences[:, 1:].tolist()]
            best = generate(model, **inputs)[:, 1:].tolist()
            assert [tokens[: tokens.index(EOS) + 1] for tokens in best] == found[::4]
            ours += found
            scores += made.sequences_scores.tolist()
        theirs = [beam for found in self.numbers["beams"] for beam in found]
        expected = [self.ours_of[beam["tokens"]].tolist() for beam in theirs]
        same = [mine == other for mine, other in zip(ours, expected, strict=True)]
        count, lengths = len(self.pairs), [len(tokens) for tokens in ours[::4]]
        assert all(same[::4]), "the best one differs"
        # Those of ours alone ended in the last step, where better ones take the place of some that had ended before.
        behind = 0
        for first in range(0, len(same), 4):
            mine, others = ours[first : first + 4], expected[first : first + 4]
            alone = [tokens for tokens in mine if tokens not in others]
            behind += len(alone)
            assert all(len(tokens) == max(map(len, others)) for tokens in alone)
        search = self.numbers["search"]
        assert (search["min_len"], search["unk_penalty"], search["max_len_a"]) == (1, 0, 0)
        return [
            row(
                f"{count} translations, beam 4, length penalty 0.6",
                digits=digits(torch.tensor(scores[::4]), torch.tensor([beam["score"] for beam in theirs[::4]])),
                note=f" in scores, and in every token; {min(lengths)} to {max(lengths)} tokens long",
            ),
            row(
                f"the {3 * count} beams behind the best",
                different=f"{behind} are others: the best four of all that ended, there the first four",
            ),
            row(
                "longest translation",
                different=f"50 more than the longest source (Vaswani et al.), there {search['max_len_b']} by default",
            ),
        ]

    def average(self) -> dict[str, Any]:
        """The mean of five checkpoints."""
        states = [self.state(state) for state in self.tensors["average"]]
        model = self.model("big", self.tensors["average"][0]).float()
        with tempfile.TemporaryDirectory() as folder:
            for number, state in enumerate(states):
                model.load_state_dict(state, strict=False)
                model.save_pretrained(f"{folder}/{number}")
            ours = average_checkpoints([f"{folder}/{number}" for number in range(len(states))])
        worst = 15
        for name in states[0]:
            # What its scripts/average_checkpoints.py does: a sum in float32, then a division.
            total = torch.zeros_like(states[0][name], dtype=torch.float32)
            for state in states:
                total += state[name].float()
            worst = min(worst, digits(ours[name], total / len(states)) if total.any() else 15)
        return row(
            "mean of 5 checkpoints",
            digits=worst,
            note="; its script is not in the package: it was read, not run",
        )


if __name__ == "__main__":
    main()
