"""The training objective against the decoder's own forwards, and a run against its resumption."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).parents[2]))  # last, so that an installed package comes first

from training.data import EOS, MASK, Corpus, Source, train_tokenizer  # noqa: E402
from training.objective import (  # noqa: E402
    doubled_attention,
    doubled_positions,
    draw_masked,
    sbd_loss,
)
from training.synthetic import _whole_document, exact_document, python_document  # noqa: E402
from training.trainer import Recipe, Trainer  # noqa: E402

MASK_ID = 1


def tiny_model(seed: int = 0, vocab_size: int = 48) -> Any:
    """A random Qwen3, its norms drawn away from 1 so that none can be missing unseen."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
        mask_token_id=MASK_ID,
        attn_implementation="eager",
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def block_by_block_loss(model: Any, tokens: Any, masked: Any, block_size: int) -> tuple[Any, Any]:
    """Sums of eq. 14's two parts, as a decoder would see them: a causal forward of the clean text,
    and per block one uncached forward of [clean past, causal][noisy block, bidirectional]."""
    batch, length = tokens.shape
    ntp = matp = torch.zeros((), dtype=torch.float64)
    for row in range(batch):
        clean = tokens[row]
        logits = model(input_ids=clean[None]).logits[0]
        for t in range(length - 1):
            ntp = ntp - logits[t].log_softmax(-1)[clean[t + 1]]
        for start in range(0, length - block_size + 1, block_size):
            end = start + block_size
            noisy = clean[:end].clone()
            noisy[start:] = torch.where(masked[row, start:end], MASK_ID, clean[start:end])
            sees = torch.ones(end, end, dtype=torch.bool).tril()
            sees[start:, start:] = True
            additive = torch.zeros(end, end, dtype=torch.float64).masked_fill(~sees, -torch.inf)
            logits = model(input_ids=noisy[None], attention_mask=additive[None, None]).logits[0]
            for t in range(start, end):
                if masked[row, t]:
                    matp = matp - logits[t].log_softmax(-1)[clean[t]]
    return ntp, matp


@pytest.mark.parametrize(("length", "block_size"), [(12, 4), (13, 5), (9, 9), (7, 1)])
def test_doubled_sequence_is_every_block_at_once(length: int, block_size: int) -> None:
    model = tiny_model().double()  # but transformers keeps norms, RoPE and softmax in float32
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(2, 48, (3, length), generator=generator)
    masked = draw_masked(3, length, generator)
    masked[0, 0] = True  # at least one
    ntp, matp = block_by_block_loss(model, tokens, masked, block_size)
    losses = sbd_loss(model, tokens, masked, block_size, MASK_ID)
    count = int(masked[:, : length // block_size * block_size].sum())
    torch.testing.assert_close(losses.total, (ntp + matp) / (3 * length), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.ntp, ntp / (3 * (length - 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.matp, matp / count, rtol=1e-6, atol=0)

    slow = torch.autograd.grad((ntp + matp) / (3 * length), list(model.parameters()))
    fast = torch.autograd.grad(losses.total, list(model.parameters()))
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_doubled_attention_by_hand() -> None:
    """Five tokens in blocks of two: the fifth is in no whole block and has no noisy twin."""
    rows = """
        x....|....
        xx...|....
        xxx..|....
        xxxx.|....
        xxxxx|....
        .....|xx..
        .....|xx..
        xx...|..xx
        xx...|..xx
    """.split()
    expected = [[cell == "x" for cell in row if cell != "|"] for row in rows]
    assert doubled_attention(5, 2).tolist() == expected
    assert doubled_positions(5, 2).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_a_sequence_shorter_than_a_block_is_refused() -> None:
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="block_size is 4, expected at most the 3 tokens"):
        sbd_loss(tiny_model(), tokens, tokens.bool(), 4, MASK_ID)


def test_each_sequence_draws_its_own_masking_rate() -> None:
    """eta ~ U(0, 1) per sequence: their mean is 1/2, their deviation 1/sqrt(12)."""
    rates = draw_masked(4000, 400, torch.Generator().manual_seed(0)).double().mean(dim=1)
    assert rates.mean().item() == pytest.approx(0.5, abs=0.02)
    assert rates.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_generated_python_has_the_layout_of_the_real_text() -> None:
    rng = Random(0)
    for _ in range(300):
        document = _whole_document(rng)
        assert ast.unparse(ast.parse(document)) == document


def test_some_documents_start_further_down() -> None:
    seeds = range(400)
    whole = sum(_whole_document(Random(seed)) == python_document(Random(seed)) for seed in seeds)
    assert 0.7 < whole / len(seeds) < 0.9
    assert all(
        _whole_document(Random(seed)).endswith(
            python_document(Random(seed)).split("\n")[-1].strip()
        )
        for seed in seeds
    )


ANSWERS: dict[str, Callable[[list[str]], list[str]]] = {
    "add": lambda given: [str(sum(map(int, given)))],
    "copy": lambda given: given,
    "reverse": lambda given: given[::-1],
    "sort": sorted,
}


def test_exact_tasks_are_right() -> None:
    rng = Random(0)
    for _ in range(300):
        document = exact_document(rng)
        if document.startswith("assert"):
            exec(document, {})
            continue
        task, *steps, answer = document.split("\n")
        _, name, *operands = task.split()
        assert answer.split()[2:] == ANSWERS[name](operands)
        for step in steps:
            total, right = step[2:].split(" write ")[0].split(" = ")
            assert eval(total) == int(right)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = Random(0)
    sources = [
        Source([python_document(rng) for _ in range(200)], 0.8),
        Source([exact_document(rng) for _ in range(50)], 0.2),
    ]
    texts = [text for source in sources for text in source.documents]
    return Corpus(sources, train_tokenizer(texts, 320), seed=0)


def test_tokenizer_keeps_text_and_digits_apart() -> None:
    text = "def f(x):\n    return x + 1234  # naïve \U0001f40d\n"
    tokenizer = train_tokenizer([text, "1234 1234 1234"] * 9, 320)
    assert (tokenizer.token_to_id(EOS), tokenizer.token_to_id(MASK)) == (0, 1)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]


def test_batches_depend_on_the_step_alone(corpus: Corpus) -> None:
    batch = corpus.batch(3, 4, 64)
    assert batch.shape == (4, 64)
    assert torch.equal(batch, corpus.batch(3, 4, 64))
    assert not torch.equal(batch, corpus.batch(4, 4, 64))


def run(corpus: Corpus, out: Path, recipe: Recipe, stop: int | None = None) -> Trainer:
    """A run in `out`; `stop` interrupts it after that many steps, past its last checkpoint at 4."""
    model = tiny_model(vocab_size=320)
    trainer = Trainer(model, recipe, corpus.batch, corpus.fingerprint, out)
    if stop is None:
        trainer.run(save_every=4, report_every=2)
        return trainer

    def interrupted(step: int, batch_size: int, length: int) -> Any:
        if step == stop:
            raise KeyboardInterrupt
        return corpus.batch(step, batch_size, length)

    trainer.batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run(save_every=4, report_every=2)
    return trainer


RECIPE = Recipe(
    steps=10, batch_tokens=128, lengths=(32, 64), block_sizes=(2, 8), warmup_steps=2, cooldown=0.4
)


def test_a_resumed_run_is_the_unbroken_run(corpus: Corpus, tmp_path: Path) -> None:
    unbroken = run(corpus, tmp_path / "unbroken", RECIPE)
    run(corpus, tmp_path / "broken", RECIPE, stop=6)
    resumed = run(corpus, tmp_path / "broken", RECIPE)
    assert resumed.curve == unbroken.curve
    assert [point["step"] for point in resumed.curve] == [2, 4, 6, 8, 10]
    weights = unbroken.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name

    # The folder is a checkpoint that transformers opens, of these very weights.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "broken")
    assert again.config.mask_token_id == MASK_ID
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert not (tmp_path / "broken" / "saving").exists()


def test_steps_may_change_only_before_the_cooldown(corpus: Corpus, tmp_path: Path) -> None:
    run(corpus, tmp_path, RECIPE, stop=5)
    longer = Recipe(**{**vars(RECIPE), "steps": 20})
    assert Trainer(tiny_model(vocab_size=320), longer, corpus.batch, corpus.fingerprint, tmp_path)
    for recipe, data in (
        (Recipe(**{**vars(RECIPE), "steps": 4}), corpus.fingerprint),  # would have cooled by now
        (Recipe(**{**vars(RECIPE), "seed": 1}), corpus.fingerprint),
        (RECIPE, "other data"),
    ):
        with pytest.raises(ValueError, match="belongs to another run: expected"):
            Trainer(tiny_model(vocab_size=320), recipe, corpus.batch, data, tmp_path)


def test_learning_rate_warms_up_holds_and_cools_down() -> None:
    recipe = Recipe(steps=100, learning_rate=1.0, warmup_steps=10, cooldown=0.5)
    rates = [recipe.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == pytest.approx([1.0] * 42)
    assert rates[75] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)


def test_training_lowers_both_losses(corpus: Corpus, tmp_path: Path) -> None:
    recipe = Recipe(steps=60, batch_tokens=512, lengths=(64,), warmup_steps=5, bfloat16=False)
    curve = run(corpus, tmp_path, recipe).curve
    assert curve[-1]["ntp"] < 0.7 * curve[0]["ntp"]
    assert curve[-1]["matp"] < 0.8 * curve[0]["matp"]
