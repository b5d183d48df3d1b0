"""The translation recipe's tokenizer, batches and model against stated values."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from launcher import RECIPE_ENVIRONMENT
from translation import model as transformer
from translation import tokens
from translation import train as recipe
from translation.data import load_corpus

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"


# ---- the tokenizer ----


def test_tokenizer_gives_every_text_back(tokenizer, tmp_path):
    """Bytes are its alphabet: nothing is unknown, umlauts, other scripts and double spaces come back."""
    texts = [
        "Größenänderung  von Äpfeln",
        "naïve €, 漢字, 🙂",
        "x",
        '"A&B" - (z.B.)',
        "<s>old</s> new",
        "a<pad>b </s>",
    ]
    model = transformer.make_transformer("tiny", len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for ours in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        encoded = tokens.ids_of(texts, ours)
        assert [ours.decode(ids, skip_special_tokens=True) for ids in encoded] == texts
        assert all(ids.index(tokens.EOS) == len(ids) - 1 and tokens.PAD not in ids for ids in encoded)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 1000)


def test_tokenizer_is_one_for_both_languages(tokenizer):
    """A frequent word of either side is one token, with the space before it."""
    assert tokenizer.tokenize("the der") == ["Ġthe", "Ġder"]


@pytest.mark.slow
def test_tokenizer_is_the_same_on_every_machine(tokenizer, tmp_path):
    """Another process, with another number of threads and another hash seed."""
    code = (
        f"import sys; sys.path.insert(0, {str(RECIPES)!r})\n"
        "from translation import tokens as t\nfrom translation.data import load_corpus\n"
        "rows = load_corpus(max_train_samples=2000).train\nprint(t.train_tokenizer(t.sentences_of(rows), "
        "1000).backend_tokenizer.to_str())"
    )
    environment = {
        **RECIPE_ENVIRONMENT,
        "RAYON_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip().splitlines()[-1] == tokenizer.backend_tokenizer.to_str()


def test_tokenizers_that_differ_are_refused(tokenizer, monkeypatch):
    tokens.check_same_tokenizer(tokenizer, Path("here"))
    monkeypatch.setattr(tokens, "gather_object", lambda digests: [*digests, "another"])
    with pytest.raises(
        recipe.SettingError,
        match="tokenizer_dir must hold the same tokenizer on all machines, got different ones in 'here'",
    ):
        tokens.check_same_tokenizer(tokenizer, Path("here"))


def test_saving_a_tokenizer_twice_keeps_the_first(tokenizer, tmp_path):
    other = tokens.train_tokenizer(["a b c"], 300)
    for one in (tokenizer, other):
        tokens.save_tokenizer(one, tmp_path / "folder")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == len(tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ---- batches ----


def test_batches_by_hand():
    """
    (source, target) lengths; sorted by target, then source: (2,1) (1,2) (3,3) | (2,4) (5,4). With 9 tokens: three rows
    of up to 3, and the fourth would make 4 x 4 > 9; then 4 x 1, for 5 x 2 > 9; then 5 x 1.
    """
    lengths = np.array([[5, 4], [3, 3], [1, 2], [2, 4], [2, 1]])
    assert sorted(sorted(batch) for batch in tokens.make_batches(lengths, 9)) == [[0], [1, 2, 4], [3]]
    assert sorted(sorted(batch) for batch in tokens.make_batches(lengths, 10)) == [[0, 3], [1, 2, 4]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=80),
    max_tokens=st.integers(40, 200),
    world_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_row_once_and_equally_many_batches_per_rank(lengths, max_tokens, world_size, seed):
    lengths = np.array(lengths)
    ranks = [
        tokens.TokenBatches(lengths, max_tokens, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (0, 1, 5):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        assert {len(own) for own in batches} == {len(sampler) for sampler in ranks}
        assert len({len(sampler) for sampler in ranks}) == 1
        order = [batch for together in zip(*batches, strict=True) for batch in together]
        once = tokens.make_batches(lengths, max_tokens, seed, epoch)
        assert order == (once * world_size)[: len(order)], "in the epoch's order, then from its start"
        assert len(order) - len(once) < world_size
        assert sorted(row for batch in once for row in batch) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= max_tokens for batch in once)


def test_tokens_of_an_update_by_hand():
    """
    The batches above with 9 tokens: (2,1) (1,2) (3,3) | (2,4) | (5,4). Targets hold 14 tokens, in 3 x 3 + 4 + 4 = 17
    positions, sources 13 in 3 x 3 + 2 + 5 = 16: three batches. An update of two ranks and two micro-batches has four.
    """
    lengths = np.array([[5, 4], [3, 3], [1, 2], [2, 4], [2, 1]])
    sampler = tokens.TokenBatches(lengths, 9, rank=1, world_size=2)
    assert sampler.tokens_per_update(2) == pytest.approx(
        {
            "source": 4 / 3 * 13,
            "target": 4 / 3 * 14,
            "source_padded": 4 / 3 * 16,
            "target_padded": 4 / 3 * 17,
        }
    )
    assert sampler.tokens_per_update(3) == sampler.tokens_per_update(2), "an epoch has two of each rank"
    assert sampler.padding() == pytest.approx(1 - 27 / 33)


def test_epochs_differ_and_a_seed_repeats():
    lengths = np.random.default_rng(0).integers(3, 12, size=(500, 2))
    first, second = (tokens.make_batches(lengths, 100, seed=1, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in second}, (
        "other rows together, too"
    )
    assert sorted(map(len, first)) == sorted(map(len, second))
    assert tokens.make_batches(lengths, 100, seed=1, epoch=1) == second
    assert tokens.make_batches(lengths, 100, seed=2, epoch=1) != second


def test_batches_of_the_shipped_text():
    """As by default: 1,024 tokens; 3.4 % of all positions are padding. Sorted by nothing it would be 55 %."""
    corpus = load_corpus()
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (27_467, 1_262, 1_052)
    tokenizer = tokens.train_tokenizer(tokens.sentences_of(corpus.train), 4000)
    sets = tokens.encode_corpus(corpus, tokenizer, max_length=128)
    assert len(sets.train) == 27_439
    lengths = tokens.token_counts(sets.train)
    assert lengths.mean(axis=0) == pytest.approx([21.1, 23.6], abs=0.1)
    sampler = tokens.TokenBatches(lengths, 1024, world_size=2)
    assert len(sampler) == pytest.approx(340, abs=5)
    assert sampler.padding() == pytest.approx(0.034, abs=0.003)
    per_batch = [lengths[batch, 1].sum() for batch in tokens.make_batches(lengths, 1024)]
    assert np.mean(per_batch) == pytest.approx(955, abs=15)
    assert max(per_batch) <= 1024


def test_collate_by_hand():
    batch = tokens.collate([{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [8, 1], "labels": [9, 4, 1]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 1], [8, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[7, 1, -100], [9, 4, 1]],
        "decoder_input_ids": [[0, 7, 1], [0, 9, 4]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_long_rows(tokenizer):
    """
    Of training rows the long ones are left out; of the others none, cut at the model's positions with `</s>` kept.
    """
    rows = datasets.Dataset.from_dict({"source": ["the " * 3000, "the"], "target": ["der", "der"]})
    corpus = dataclasses.replace(load_corpus(max_train_samples=1), train=rows, validation=rows, test=rows)
    sets = tokens.encode_corpus(corpus, tokenizer, max_length=128)
    assert sets.train["source"][:] == ["the"]
    assert tokens.token_counts(sets.test).tolist() == [[2, 2], [1024, 2]]
    assert (sets.test["row"][:], sets.test[1]["input_ids"][-1]) == ([1, 0], tokens.EOS)


# ---- the model ----


@pytest.mark.parametrize(("size", "count"), [("base", 60_522_496), ("big", 209_125_376)])
def test_transformer_has_the_published_shape(size, count):
    """
    Trained parameters with 32,000 tokens, d wide, ffn f: a matrix of 32,000 d; 6 encoder layers of 4 (d^2 + d) + (2 d
    f + f + d) + 4 d; 6 decoder layers of 8 (d^2 + d) + (2 d f + f + d) + 6 d. Vaswani et al. say 65 and 213 million,
    with 37,000 tokens.
    """
    d, f = (512, 2048) if size == "base" else (1024, 4096)
    feed = 2 * d * f + f + d
    assert count == 32_000 * d + 6 * (4 * (d * d + d) + feed + 4 * d) + 6 * (8 * (d * d + d) + feed + 6 * d)
    with torch.device("meta"):
        model = transformer.make_transformer(size, 32_000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert (model.config.dropout, model.config.activation_function) == (0.1 if size == "base" else 0.3, "relu")


def test_transformer_by_hand():
    """
    Positions are sines and cosines of pos / 10000^(2i/d), not trained; one matrix embeds and predicts; weights start
    at 1/sqrt(d).
    """
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", 4000).eval()
    shared = model.model.shared.weight
    assert model.lm_head.weight is shared
    assert model.model.encoder.embed_tokens.weight is shared
    assert model.model.decoder.embed_tokens.weight is shared
    assert shared.detach().std().item() == pytest.approx(128**-0.5, rel=0.01)
    assert model.model.encoder.embed_scale == pytest.approx(128**0.5)
    positions = model.model.encoder.embed_positions.weight
    assert not positions.requires_grad
    assert positions[3, 0].item() == pytest.approx(math.sin(3))
    assert positions[3, 64].item() == pytest.approx(math.cos(3))
    assert positions[3, 1].item() == pytest.approx(math.sin(3 / 10_000 ** (2 / 128)))
    hidden = model.model.encoder(input_ids=torch.tensor([[5, 9, 1]])).last_hidden_state
    assert hidden.mean(-1).abs().max().item() < 1e-5, "post-norm: the last thing that a layer does is to normalise"


def test_smoothed_loss_by_hand():
    """Three tokens, of which one label is missing: (1 - e) of the label's nats and e of the mean over all tokens."""
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    log_probs = logits.log_softmax(-1)
    output = type("Output", (), {"logits": logits})
    plain, even = -log_probs[0, 0, 0], -log_probs[0, 0].mean()
    loss = transformer.smoothed_loss(output, torch.tensor([[0, -100]]), label_smoothing=0.1)
    assert loss.item() == pytest.approx((0.9 * plain + 0.1 * even).item())
    spread = transformer.smoothed_loss(output, torch.tensor([[0, -100]]), num_items_in_batch=4, label_smoothing=0.1)
    assert spread.item() == pytest.approx(loss.item() / 4)
    assert transformer.smoothed_loss(output, torch.tensor([[0, -100]]), label_smoothing=0.0).item() == pytest.approx(
        plain.item()
    )


def test_nll_of_a_sentence_is_its_own():
    """Whoever shares its batch: padding counts nowhere. A model that knows nothing needs log V nats per token."""
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", 300).eval()
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 8, 9, 1]}, {"input_ids": [9, 1], "labels": [4, 1]}]
    together = transformer.sentence_nll(model, tokens.collate(rows))
    alone = torch.cat([transformer.sentence_nll(model, tokens.collate([row])) for row in rows])
    torch.testing.assert_close(together, alone)
    with torch.no_grad():
        model.model.shared.weight.zero_()
    torch.testing.assert_close(
        transformer.sentence_nll(model, tokens.collate(rows)), torch.tensor([4.0, 2.0]) * math.log(300)
    )


def test_translations_keep_order_length_and_mode(tokenizer):
    """
    Of an untrained model: sentences of any order give the same translations; nothing is longer than its batch's source
    and 50.
    """
    torch.manual_seed(0)
    model = transformer.make_transformer("tiny", len(tokenizer)).train()
    sentences = ["a", "the long one of these four", "b c", "d"]
    forward = transformer.translate(model, tokenizer, sentences, num_beams=2)
    assert model.training
    assert transformer.translate(model, tokenizer, sentences[::-1], num_beams=2) == forward[::-1]
    assert len(set(forward)) > 1
    ids = torch.tensor([tokenizer("a b")["input_ids"]])
    for beams in (1, 3):
        made = transformer.generate(model.eval(), ids, torch.ones_like(ids), beams)
        assert made.shape[1] <= ids.shape[1] + 50
        assert made[0, 0] == tokens.PAD
        assert made[0, -1] == tokens.EOS
        assert tokens.PAD not in made[0, 1:]


def test_average_of_checkpoints(tmp_path):
    """(1 + 4) / 2 everywhere, positions apart."""
    for value in (1.0, 4.0):
        model = transformer.make_transformer("tiny", 300)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(value)
        model.save_pretrained(tmp_path / str(value))
    mean = transformer.average_checkpoints([tmp_path / "1.0", tmp_path / "4.0"])
    trained = {name for name in mean if "embed_positions" not in name and name != "final_logits_bias"}
    assert all((mean[name] == 2.5).all() for name in trained)
    assert mean["model.encoder.embed_positions.weight"][3, 0].item() == pytest.approx(math.sin(3))
    assert mean.keys() == model.state_dict().keys()
