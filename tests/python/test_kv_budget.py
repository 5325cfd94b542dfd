"""kv_budget and prefix_cache: what they allow, what they refuse, and that they change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.command import PROMPT, check_error, run_here

from sbd_engine import Completion, Engine, SbdError, SbdMemoryError, SbdValueError
from sbd_engine.sizes import parse_size, shown

GENEROUS = 2**30
CHAT = [{"role": "user", "content": "the first of some turns, with the words of it all"}]
CALL: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def keeping(model: Path) -> Iterator[Engine]:
    with Engine(model, kv_budget=GENEROUS, prefix_cache=GENEROUS // 2) as engine:
        yield engine


@pytest.fixture(scope="module")
def forgetting(model: Path) -> Iterator[Engine]:
    with Engine(model, kv_budget=GENEROUS, prefix_cache=0) as engine:
        yield engine


def result(done: Completion) -> tuple[Any, ...]:
    return done.text, done.tokens, done.finish_reason, done.stats.nfe, done.logprobs


class TestDefaults:
    def test_of_the_engine(self, model: Path) -> None:
        with Engine(model) as engine:
            assert engine.kv_budget > 2**20
            assert engine.prefix_cache == engine.kv_budget // 4
        with Engine(model, kv_budget=4000) as engine:
            assert (engine.kv_budget, engine.prefix_cache) == (4000, 1000)
            assert repr(engine).endswith("kv_budget 3.9 KiB, prefix_cache 1000 bytes>")

    def test_what_is_measured_computes_every_prompt(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sbd_engine import _core
        from sbd_engine.cli import main

        made: list[int] = []
        make = Engine.__init__

        def recorded(self: Engine, *arguments: Any, **named: Any) -> None:
            make(self, *arguments, **named)
            made.append(self.prefix_cache)

        monkeypatch.setattr(Engine, "__init__", recorded)
        tasks = tmp_path / "tasks.jsonl"
        tasks.write_text('{"prompt": "x", "answer": "y"}')
        for command in ("eval", "sweep"):
            assert main.run([command, str(model), "--tasks", str(tasks), "--json"]) == 0
        text = tmp_path / "text.txt"
        text.write_text("some words")
        assert main.run(["perplexity", str(model), str(text), "--json"]) == 0
        assert made == [0, 0, 0]
        core = _core.Engine(model, device="cpu", n_threads=1, n_ctx=0, kv_dtype="f16")
        assert core.prefix_cache == 0  # what bench makes


class TestReuse:
    @pytest.mark.parametrize("decoder", ["ntp", "sbd", "sbd_lossless"])
    def test_a_chat_s_next_turn(self, decoder: str, keeping: Engine, forgetting: Engine) -> None:
        encode = keeping.tokenizer.encode_chat
        # A size that is asked for is kept: statistics are not of how long forwards took.
        blocks = {} if decoder == "ntp" else {"block_size": keeping.defaults["block_size"]}
        call = {**CALL, **blocks, "decoder": decoder, "logprobs": 1}
        first = keeping.generate(encode(CHAT), **call)
        turns = [*CHAT, {"role": "assistant", "content": first.text}]
        second = encode([*turns, {"role": "user", "content": "and another"}])
        done = keeping.generate(second, **call)
        assert done.stats.cached_tokens >= len(encode(CHAT)) - 1
        assert done.stats.cached_tokens < done.stats.prompt_tokens
        cold = forgetting.generate(second, **call)
        assert cold.stats.cached_tokens == 0
        assert result(done) == result(cold)

    def test_a_text_again(self, keeping: Engine) -> None:
        ids = [*range(40, 140)]
        done = [keeping.generate(ids, decoder="ntp", **CALL) for _ in range(2)]
        assert [each.stats.cached_tokens for each in done] == [0, 99]  # the last row is computed
        assert result(done[0]) == result(done[1])
        streamed = keeping.stream(ids, decoder="ntp", **CALL)
        list(streamed)
        assert streamed.completion.stats.cached_tokens == 99

    def test_a_prompt_that_others_are_reading(self, forgetting: Engine) -> None:
        system = [*range(30, 230)]
        prompts = [[*system, n, n + 1] for n in range(8)]
        done = forgetting.generate_batch(prompts, decoder="ntp", **CALL)
        assert sorted(each.stats.cached_tokens for each in done) == [0, *[200] * 7]
        alone = [forgetting.generate(prompt, decoder="ntp", **CALL) for prompt in prompts]
        assert [result(each) for each in done] == [result(each) for each in alone]

    def test_speeds_count_what_was_computed(self, keeping: Engine) -> None:
        ids = [*range(60, 160)]
        keeping.generate(ids, decoder="ntp", **CALL)
        stats = keeping.generate(ids, decoder="ntp", **CALL).stats
        assert stats.cached_tokens == 99
        assert 0 < stats.prefill_tok_s < 1e3 / stats.ttft_ms * 100


class TestBudget:
    def test_what_could_never_fit(self, model: Path) -> None:
        with Engine(model, kv_budget=70_000) as engine:
            assert len(engine.generate(PROMPT, max_tokens=4).tokens) <= 4
            with pytest.raises(SbdMemoryError) as caught:
                engine.generate([5] * 200, max_tokens=300)
            said = str(caught.value)
            assert said.startswith("the KV cache of 512 positions takes 73728 bytes")
            assert "bytes, more than the `kv_budget` of 70000: shorten the prompt" in said
            with pytest.raises(SbdMemoryError, match="prompt 1 of the batch: the KV cache of"):
                engine.generate_batch([PROMPT, [5] * 200], max_tokens=300)

    def test_others_wait_for_room(self, model: Path) -> None:
        prompts = [[*range(n, n + 30)] for n in range(6)]
        with Engine(model, kv_budget=GENEROUS) as engine:
            expected = [each.tokens for each in engine.generate_batch(prompts, **CALL)]
        with Engine(model, kv_budget=25_000) as engine:
            done = engine.generate_batch(prompts, **CALL)
            assert [each.tokens for each in done] == expected

    @pytest.mark.parametrize(
        ("options", "kind", "complaint"),
        [
            ({"kv_budget": 0}, ValueError, "`kv_budget` >= 1, got 0"),
            ({"kv_budget": 1.5}, TypeError, "integer `kv_budget`, got 1.5"),
            ({"kv_budget": "1GiB"}, TypeError, "integer `kv_budget`, got '1GiB'"),
            ({"kv_budget": 2**64}, ValueError, "`kv_budget` <= "),
            ({"prefix_cache": -1}, ValueError, "`prefix_cache` >= 0, got -1"),
            ({"prefix_cache": True}, TypeError, "integer `prefix_cache`"),
            (
                {"kv_budget": 1000, "prefix_cache": 1001},
                ValueError,
                "`prefix_cache` within the `kv_budget` of 1000 bytes, got 1001",
            ),
        ],
    )
    def test_bad_input(
        self, model: Path, options: dict[str, Any], kind: type, complaint: str
    ) -> None:
        with pytest.raises(kind, match=complaint) as caught:
            Engine(model, **options)
        assert isinstance(caught.value, SbdError)

    def test_the_command(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        call = ("run", model, "-p", PROMPT, "-n", 300)
        done = run_here(capsys, *call, "--kv-budget", "50kB")
        check_error(done, "more than the --kv-budget of 50000: shorten the prompt, lower --max-tok")
        check_error(run_here(capsys, *call, "--kv-budget", "much"), "--kv-budget in bytes, such as")
        check_error(run_here(capsys, *call, "--kv-budget", 0), "expected --kv-budget >= 1, got 0")
        assert run_here(capsys, *call, "--kv-budget", "64MiB").returncode == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("1000B", 1000),
        ("2KiB", 2048),
        ("2k", 2048),
        ("2kB", 2000),
        ("512MiB", 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("2gi", 2**31),
        ("1GB", 10**9),
        ("3T", 3 * 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--kv-budget", text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1.2.3", "GiB", "1 PiB", "1e9", "nan", "1iB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SbdValueError, match="expected --kv-budget in bytes, such as 2GiB"):
        parse_size("--kv-budget", text)


def test_sizes_as_people_read_them() -> None:
    sizes = (0, 1023, 1024, 1536, 2**20 - 1, 3 * 2**29, 2**43, 2**60)
    assert [shown(size) for size in sizes] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "1024.0 KiB", "1.5 GiB", "8.0 TiB"),
        "1048576.0 TiB",
    ]
