"""The Python surface: Engine, its completions, streams and batches, on a tiny random model."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.made_event import Event
from python.tiny_model import BOS, EOS, MASK, VOCAB_SIZE, byte_tokenizer, write_tiny_model

from sbd_engine import Completion, Engine, SbdError, _core
from sbd_engine.parameters import parse
from sbd_engine.session import Session

PROMPT = "Hello the world"
EOS_ID = byte_tokenizer().token_to_id(EOS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model) as engine:
        yield engine


def same(one: Completion, other: Completion) -> bool:
    return (one.text, one.tokens, one.finish_reason, one.stats.nfe) == (
        other.text,
        other.tokens,
        other.finish_reason,
        other.stats.nfe,
    )


class TestGenerate:
    def test_length(self, engine: Engine) -> None:
        completion = engine.generate(PROMPT, max_tokens=37, ignore_eos=True)
        assert len(completion.tokens) == 37
        assert completion.finish_reason == "length"
        assert completion.text == engine.tokenizer.decode(completion.tokens)
        stats = completion.stats
        assert stats.prompt_tokens == len(engine.tokenizer.encode(PROMPT))
        assert 37 / 16 < stats.nfe < 37
        assert stats.tokens_per_forward == 37 / stats.nfe
        assert 0 < stats.ttft_ms < math.inf
        assert 0 < stats.prefill_tok_s < math.inf
        assert 0 < stats.decode_tok_s < math.inf
        assert byte_tokenizer().token_to_id(MASK) not in completion.tokens

    def test_ntp_takes_one_forward_per_token(self, engine: Engine) -> None:
        completion = engine.generate(PROMPT, max_tokens=20, decoder="ntp", ignore_eos=True)
        assert completion.stats.nfe == 20
        greedy: list[int] = []
        ids = engine.tokenizer.encode(PROMPT)
        for _ in range(20):
            logits = engine.forward([*ids, *greedy])[-1]
            logits[byte_tokenizer().token_to_id(MASK)] = -np.inf
            greedy.append(int(logits.argmax()))
        assert completion.tokens == greedy

    def test_ids_and_numpy_ids_are_taken_as_they_are(self, engine: Engine) -> None:
        ids = engine.tokenizer.encode(PROMPT)
        expected = engine.generate(PROMPT, max_tokens=20)
        assert same(engine.generate(ids, max_tokens=20), expected)
        assert same(engine.generate(np.array(ids), max_tokens=np.int64(20)), expected)
        assert not same(engine.generate(ids[1:], max_tokens=20), expected)  # without BOS

    def test_same_result_streamed_batched_and_on_one_thread(
        self, engine: Engine, model: Path
    ) -> None:
        calls: list[dict[str, Any]] = [
            {"prompt": f"{PROMPT} {n}", "max_tokens": 10 + n, "seed": n, "temperature": n % 3}
            for n in range(20)
        ]
        calls[3]["decoder"] = "ntp"
        calls[4] |= {"unmask": "top_n", "top_n": 4, "block_size": 7}
        alone = [engine.generate(**call) for call in calls]
        for call, expected in zip(calls, alone, strict=True):
            with engine.stream(**call) as stream:
                chunks = list(stream)
            assert same(stream.completion, expected)
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert [token for chunk in chunks for token in chunk.tokens] == expected.tokens
            assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].finish_reason == expected.finish_reason
        assert all(map(same, engine.generate_batch(calls), alone))
        with Engine(model, n_threads=1) as single:
            assert single.n_threads == 1
            assert all(map(same, single.generate_batch(calls), alone))

    def test_eos_ends_the_tokens_and_is_not_in_the_text(self, engine: Engine) -> None:
        ended = next(
            completion
            for seed in range(400)
            for completion in [engine.generate(PROMPT, max_tokens=100, temperature=4.0, seed=seed)]
            if completion.finish_reason == "stop"
        )
        assert ended.tokens.index(EOS_ID) == len(ended.tokens) - 1
        assert ended.text == engine.tokenizer.decode(ended.tokens[:-1])
        assert EOS not in ended.text

    def test_special_tokens_may_be_shown(self, engine: Engine) -> None:
        bos = engine.tokenizer.backend.token_to_id(BOS)
        call: dict[str, Any] = {"logit_bias": {bos: 100}, "max_tokens": 3}
        assert engine.generate(PROMPT, **call).text == ""
        with engine.stream(PROMPT, **call, skip_special_tokens=False) as stream:
            assert "".join(chunk.text for chunk in stream) == stream.completion.text == 3 * BOS
        ended = engine.generate(PROMPT, logit_bias={EOS_ID: 100}, skip_special_tokens=False)
        assert ended.tokens == [EOS_ID] and ended.text == ""

    def test_stop_string_that_spans_tokens(self, engine: Engine) -> None:
        whole = engine.generate(PROMPT, max_tokens=60, ignore_eos=True)
        clean = [i for i in range(8, 50) if "\ufffd" not in whole.text[i : i + 3]]
        begin = next(i for i in clean if whole.text.find(whole.text[i : i + 3]) == i)
        stop = whole.text[begin : begin + 3]
        completion = engine.generate(
            PROMPT, max_tokens=60, ignore_eos=True, stop=["never seen", stop]
        )
        assert completion.finish_reason == "stop"
        assert completion.text == whole.text[:begin]
        count = len(completion.tokens)
        assert completion.tokens == whole.tokens[:count]
        assert stop in engine.tokenizer.decode(completion.tokens)
        assert stop not in engine.tokenizer.decode(completion.tokens[:-1])
        streamed = "".join(
            chunk.text for chunk in engine.stream(PROMPT, max_tokens=60, ignore_eos=True, stop=stop)
        )
        assert streamed == completion.text
        assert engine._core.n_sequences == 0

    def test_context_full(self, model: Path) -> None:
        with Engine(model, n_ctx=20) as engine:
            completion = engine.generate([1, 2, 3], max_tokens=100, ignore_eos=True)
            assert len(completion.tokens) == 17
            assert completion.finish_reason == "length"
            with pytest.raises(ValueError, match=r"raise `n_ctx` \(the model takes 512\)$"):
                engine.generate(list(range(20)))

    def test_forward_ends_in_a_block(self, engine: Engine) -> None:
        ids = list(range(10, 22))
        logits = engine.forward(ids, block=4)
        assert logits.shape == (12, VOCAB_SIZE)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        causal = engine.forward(np.array(ids))
        assert np.array_equal(logits[:8], causal[:8])  # bit for bit
        assert not np.allclose(logits[8], causal[8])  # this row sees the rest of its block

    def test_a_model_without_a_mask_token(self, tmp_path: Path) -> None:
        with Engine(write_tiny_model(tmp_path, sbd=False)) as engine:
            assert engine.auto_decoder == "ntp"
            assert engine.generate(PROMPT, max_tokens=5, ignore_eos=True).stats.nfe == 5
            with pytest.raises(ValueError, match="mask"):
                engine.generate(PROMPT, decoder="sbd")


class TestStreams:
    def test_dropping_or_closing_a_stream_removes_its_sequence(self, engine: Engine) -> None:
        stream = engine.stream(PROMPT, ignore_eos=True)
        next(stream)
        stream.close()
        assert engine._core.n_sequences == 0
        assert stream.completion.finish_reason == "cancelled"
        assert list(stream) == []
        for _ in engine.stream(PROMPT, ignore_eos=True):
            break
        gc.collect()
        assert engine._core.n_sequences == 0

    def test_threads_share_an_engine(self, engine: Engine) -> None:
        prompts = [f"{PROMPT} {n}" for n in range(6)]
        expected = [engine.generate(prompt, max_tokens=40) for prompt in prompts]
        results: dict[int, Completion] = {}

        def work(index: int) -> None:
            results[index] = engine.generate(prompts[index], max_tokens=40)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(same(results[index], expected[index]) for index in range(6))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "kind", "complaint"),
        [
            ({"prompt": ""}, ValueError, "empty"),
            ({"prompt": []}, ValueError, "empty"),
            ({"prompt": "a\udcff"}, ValueError, "UTF-8"),
            ({"prompt": b"bytes"}, TypeError, "got bytes"),
            ({"prompt": 3}, TypeError, "got int"),
            ({"prompt": ["a"]}, TypeError, "got 'a' at position 0"),
            ({"prompt": [1, VOCAB_SIZE]}, ValueError, f"got {VOCAB_SIZE} at position 1"),
            ({"prompt": [-1]}, ValueError, "got -1"),
            ({"prompt": [2**70]}, ValueError, "at position 0"),
            ({"prompt": [1] * 512}, ValueError, "512 tokens: shorten it$"),
            ({"block_size": 0}, ValueError, "`block_size` >= 1, got 0"),
            ({"block_size": 513}, ValueError, "513"),
            ({"gamma": -0.1}, ValueError, "`gamma` >= 0, got -0.1"),
            ({"gamma": math.nan}, ValueError, "got nan"),
            ({"gamma": "x"}, TypeError, "got 'x'"),
            ({"temperature": -1}, ValueError, "temperature"),
            ({"temperature": math.inf}, ValueError, "temperature"),
            ({"temperature": 10**400}, ValueError, "temperature"),
            ({"gamma": -(10**400)}, ValueError, "gamma"),
            ({"top_k": 10**5000}, ValueError, "got one of 16610 bits"),
            ({"top_p": 0}, ValueError, "`top_p` above 0 and at most 1, got 0"),
            ({"top_p": 1.5}, ValueError, "top_p"),
            ({"top_k": -1}, ValueError, "`top_k` >= 0"),
            ({"max_tokens": 0}, ValueError, "`max_tokens` >= 1"),
            ({"max_tokens": 1.5}, TypeError, "integer `max_tokens`, got 1.5"),
            ({"max_tokens": True}, TypeError, "integer `max_tokens`"),
            ({"max_tokens": 2**31}, ValueError, "`max_tokens` <="),
            ({"seed": -1}, ValueError, "seed"),
            ({"seed": 2**64}, ValueError, "seed"),
            ({"stop": ""}, ValueError, "stop"),
            ({"stop": [3]}, TypeError, "stop"),
            ({"ignore_eos": "no"}, TypeError, "ignore_eos"),
            ({"decoder": "sdb"}, ValueError, 'unknown `decoder` "sdb"'),
            ({"unmask": "all"}, ValueError, "entropy_bounded, factor, confidence, top_n"),
            ({"unmask": 3}, TypeError, "`unmask` as a string"),
            ({"proxy": "size"}, ValueError, "entropy, confidence, margin"),
            ({"factor": 0}, ValueError, "factor"),
            ({"confidence_threshold": 1.1}, ValueError, "confidence_threshold"),
            ({"top_n": 0}, ValueError, "top_n"),
            ({"gama": 1}, TypeError, "unknown argument 'gama': did you mean gamma"),
        ],
    )
    def test_generate(
        self, engine: Engine, arguments: dict[str, Any], kind: type, complaint: str
    ) -> None:
        call = {"prompt": PROMPT, **arguments}
        with pytest.raises(kind, match=complaint) as caught:
            engine.generate(**call)
        assert isinstance(caught.value, SbdError)
        assert "\n" not in str(caught.value)
        with pytest.raises(kind, match="prompt 1 of the batch: .*" + complaint):
            engine.generate_batch([PROMPT, call])
        assert engine._core.n_sequences == 0

    def test_batch_of_a_string(self, engine: Engine) -> None:
        with pytest.raises(TypeError, match="list of prompts"):
            engine.generate_batch(PROMPT)
        assert engine.generate_batch([]) == []

    @pytest.mark.parametrize(
        ("options", "kind", "complaint"),
        [
            ({"device": "tpu"}, ValueError, "tpu"),
            ({"device": None}, TypeError, "device"),
            ({"n_threads": 0}, ValueError, "`n_threads` >= 1, got 0"),
            ({"n_threads": "2"}, TypeError, "n_threads"),
            ({"n_ctx": 0}, ValueError, "`n_ctx` >= 1"),
            ({"n_ctx": 10**6}, ValueError, "n_ctx"),
            ({"kv_dtype": "q4_0"}, ValueError, "unknown `kv_dtype` 'q4_0'.*q8_0"),
        ],
    )
    def test_engine_options(
        self, model: Path, options: dict[str, Any], kind: type, complaint: str
    ) -> None:
        with pytest.raises(kind, match=complaint) as caught:
            Engine(model, **options)
        assert isinstance(caught.value, SbdError)

    def test_files(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no such file") as caught:
            Engine(tmp_path / "none.bin")
        assert isinstance(caught.value, SbdError)
        with pytest.raises(OSError, match="folder"):
            Engine(tmp_path)
        with pytest.raises(TypeError, match="path"):
            Engine(3)  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError, match="no such file"):
            Engine(model, draft=tmp_path / "none.bin")
        with pytest.raises(TypeError, match="`draft` as a path"):
            Engine(model, draft_lora=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="one of `draft` and `draft_lora`, its other name"):
            Engine(model, draft=model, draft_lora=model)
        bad = tmp_path / "bad.bin"
        for content in (b"", b"GGUX" + bytes(60), model.read_bytes()[:-1]):
            bad.write_bytes(content)
            with pytest.raises(ValueError, match="bad.bin") as error:
                Engine(bad)
            assert isinstance(error.value, SbdError)

    def test_forward(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="empty"):
            engine.forward([])
        with pytest.raises(ValueError, match="`block` <= 3, got 4"):
            engine.forward([1, 2, 3], block=4)
        with pytest.raises(ValueError, match="token ids"):
            engine.forward([VOCAB_SIZE])
        with pytest.raises(ValueError, match="within the context of 512, got 513: shorten it$"):
            engine.forward([1] * 513)


class TestSession:
    """Without an engine: what events become."""

    def test_figures_by_a_hand_made_clock(self) -> None:
        times = iter([1.0, 3.0, 4.0, 6.0])
        session = Session([1, 2, 3, 4], (), None, called=0.5, clock=lambda: next(times))
        session.absorb(Event(prompt_rows=3))
        session.absorb(Event([], [(1, 7, 0.1, 0.9)], None, 1))
        chunk = session.absorb(Event([6, 7, 8], [(0, 6, 0.0, 1.0), (2, 8, 0.5, 0.7)], "length"))
        assert (chunk.tokens, chunk.finish_reason) == ([6, 7, 8], "length")
        assert chunk.revealed[1]._asdict() == {
            "position": 2,
            "token": 8,
            "entropy": 0.5,
            "probability": 0.7,
        }
        stats = session.completion().stats
        assert (stats.nfe, stats.tokens_per_forward) == (2, 1.5)
        assert stats.ttft_ms == 5500
        assert stats.prefill_tok_s == 4 / 3
        assert stats.decode_tok_s == 1.0  # two tokens in the two seconds after the prompt

    def test_times_are_those_of_the_events(self) -> None:
        """However late they are read."""
        times = iter([1.0, 9.0, 9.0])
        session = Session([1, 2], (), None, called=0.0, clock=lambda: next(times))
        session.absorb(Event([6], prompt_rows=2, age=6.0))
        session.absorb(Event([7, 8], finished="length", age=4.0))
        stats = session.completion().stats
        assert (stats.ttft_ms, stats.prefill_tok_s, stats.decode_tok_s) == (3000, 1.0, 1.5)

    def test_parameters_have_a_check_each(self) -> None:
        from dataclasses import fields

        from sbd_engine import parameters

        table = {option.name: option.type for option in _core.OPTIONS}
        names = {field.name for field in fields(parameters.Parameters)} - {"options", "constraint"}
        names |= {*table, *parameters.CONSTRAINTS}
        assert set(parameters.CHECKS) == names
        typed = parameters.Options.__annotations__
        assert set(typed) == names - {"prompt"}
        for name, type in table.items():
            assert typed[name].__forward_arg__ == f"{type} | None"
        assert parse({"prompt": "x", "gamma": None}).options == {}
        assert parse({"prompt": "x", "gamma": math.inf}).options == {"gamma": math.inf}


def test_converting_needs_no_engine() -> None:
    code = "import sbd_engine.convert, sys; assert 'sbd_engine._core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_config_and_tokenizer(engine: Engine) -> None:
    assert engine.config["sbd.block_size"] == 16
    assert engine.config["general.architecture"] == "qwen3"
    assert engine.defaults["gamma"] == 0.35
    assert engine.tokenizer.mask_token_id == byte_tokenizer().token_to_id(MASK)
    assert engine.tokenizer.encode("the")[0] == byte_tokenizer().token_to_id(BOS)
