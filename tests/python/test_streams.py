"""Streams under whoever embeds the engine: read and closed from many threads, in event loops, in
the middle of a Ctrl-C. A reader always gets its end, and what ended is no longer computed."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from python.tiny_model import write_tiny_model

from sbd_engine import AsyncStream, Chunk, Engine, SbdError, Stream
from sbd_engine.detokenizer import Detokenizer
from sbd_engine.engine import engine_options
from sbd_engine.random_model import random_model

PROMPT = "Hello the world"
ENDLESS: dict[str, Any] = {"ignore_eos": True, "max_tokens": 100_000, "decoder": "ntp"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), n_ctx=200_000)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, n_threads=1) as engine:
        yield engine


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@contextmanager
def held(engine: Engine) -> Iterator[threading.Thread]:
    """Another thread holds the engine, as a forward of some 100 ms would."""
    holder = in_thread(lambda: engine._core.time_forwards([64], 64, 400))
    time.sleep(0.02)
    yield holder
    holder.join()


class TestThreads:
    def test_six_readers_and_one_who_closes(self, model: Path) -> None:
        """What a server does when its clients leave."""
        choose = random.Random(0)
        ends: list[str | None] = []
        with Engine(model, n_threads=1) as engine:
            streams = [engine.stream(PROMPT, **ENDLESS) for _ in range(6)]
            over = threading.Event()

            def read(index: int) -> None:
                while not over.is_set():
                    stream = streams[index]
                    last: Chunk | None = None
                    for last in stream:  # noqa: B007
                        pass
                    assert stream.completion.finish_reason == "cancelled"
                    ends.append(last and last.finish_reason)
                    streams[index] = engine.stream(PROMPT, **ENDLESS)
                streams[index].close()

            readers = [in_thread(partial(read, index)) for index in range(6)]
            for closes in range(60):
                index = choose.randrange(6)
                streams[index].close()
                deadline = time.monotonic() + 10
                while len(ends) < closes and time.monotonic() < deadline:
                    time.sleep(0.0002)
            over.set()
            while any(reader.is_alive() for reader in readers):
                for stream in list(streams):
                    stream.close()
                time.sleep(0.001)
            assert len(ends) >= 50
            assert engine._core.n_sequences == 0
        assert set(ends) <= {"cancelled", None}  # none where the reader had not come back yet

    def test_who_waits_is_told_at_once_and_sleeps(self, engine: Engine) -> None:
        burnt: list[float] = []
        last: list[Chunk] = []
        stream = engine.stream(PROMPT, **ENDLESS)

        def read() -> None:
            before = time.thread_time()
            last.extend(stream)
            burnt.append(time.thread_time() - before)

        with held(engine) as holder:
            reader = in_thread(read)
            time.sleep(0.02)
            stream.close()
            reader.join(10)
            assert not reader.is_alive()
            assert holder.is_alive()
        assert [chunk.finish_reason for chunk in last] == ["cancelled"]
        assert burnt[0] < 0.01

    def test_two_readers_of_one_stream(self, engine: Engine) -> None:
        alone = engine.generate(PROMPT, max_tokens=60, ignore_eos=True)
        for _ in range(10):
            stream = engine.stream(PROMPT, max_tokens=60, ignore_eos=True)
            chunks: list[Chunk] = []
            readers = [in_thread(partial(chunks.extend, stream)) for _ in range(3)]
            for reader in readers:
                reader.join(10)
                assert not reader.is_alive()
            assert stream.completion.tokens == alone.tokens
            assert stream.completion.text == alone.text
            assert sorted(t for c in chunks for t in c.tokens) == sorted(alone.tokens)

    def test_close_by_the_reader_of_another_process_is_nothing(self, engine: Engine) -> None:
        stream = engine.stream(PROMPT, **ENDLESS)
        next(stream)
        stream._process += 1
        stream.close()
        with pytest.raises(SbdError, match="in a forked child"):
            next(stream)
        assert engine._core.n_sequences == 1
        del stream
        assert engine._core.n_sequences == 0

    @pytest.mark.parametrize("_", range(5))
    def test_a_closed_engine_ends_its_readers(self, model: Path, _: int) -> None:
        engine = Engine(model, n_threads=1)
        errors: list[str] = []

        def read(stream: Stream) -> None:
            try:
                for _ in stream:
                    pass
            except SbdError as error:
                errors.append(str(error))

        streams = [engine.stream(PROMPT, **ENDLESS) for _ in range(6)]
        readers = [in_thread(partial(read, stream)) for stream in streams]
        next(engine.stream(PROMPT))
        engine.close()
        for reader in readers:
            reader.join(10)
            assert not reader.is_alive()
        assert errors == ["this engine is closed: make a new one"] * 6
        for stream in streams:
            stream.close()
            assert list(stream) == []
        for call in (
            lambda: engine.generate(PROMPT),
            lambda: engine.stream(PROMPT),
            lambda: engine.generate_batch([PROMPT]),
            lambda: engine.forward([1, 2]),
            lambda: engine.device,
        ):
            with pytest.raises(SbdError, match="closed"):
                call()
        engine.close()

    def test_a_decoding_that_raises_leaves_no_sequence(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Panic(BaseException):
            """As the tokenizers' own, no Exception."""

        def feed(self: Detokenizer, *tokens: int) -> str:
            raise Panic

        monkeypatch.setattr(Detokenizer, "feed", feed)
        stream = engine.stream(PROMPT, **ENDLESS)
        with pytest.raises(Panic):
            next(stream)
        assert engine._core.n_sequences == 0
        assert list(stream) == []
        with pytest.raises(Panic):
            engine.generate_batch([PROMPT, PROMPT])
        gc.collect()
        assert engine._core.n_sequences == 0

        async def read() -> None:
            async for _ in engine.astream(PROMPT, **ENDLESS):
                pass

        with pytest.raises(Panic):
            asyncio.run(read())
        gc.collect()
        assert engine._core.n_sequences == 0

    def test_pickling_is_refused(self, engine: Engine) -> None:
        with pytest.raises(SbdError, match="make one in every process"):
            pickle.dumps(engine)


def random_shape() -> dict[str, Any]:
    """Of a model that takes seconds to make."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 300,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }


class TestInterrupts:
    @pytest.fixture(autouse=True)
    def alarm(self) -> Iterator[None]:
        """A Ctrl-C that arrives when it was ordered."""
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def test_nothing_is_lost(self, engine: Engine) -> None:
        """Neither what was committed until then nor another's text."""
        other_alone = engine.generate("Another", max_tokens=300, ignore_eos=True)
        alone = engine.generate(PROMPT, max_tokens=400, ignore_eos=True)
        other = engine.stream("Another", max_tokens=300, ignore_eos=True)
        others = [next(other)]
        interrupted = 0
        while interrupted < 8:
            tokens: list[int] = []
            stream = engine.stream(PROMPT, max_tokens=400, ignore_eos=True)
            signal.setitimer(signal.ITIMER_REAL, 0.004)
            try:
                for chunk in stream:
                    tokens += chunk.tokens
                time.sleep(1)
            except KeyboardInterrupt:
                interrupted += 1
            assert stream.completion.tokens[: len(tokens)] == tokens
            assert stream.completion.tokens == alone.tokens[: len(stream.completion.tokens)]
            stream.close()
            assert engine._core.n_sequences <= 1
        others += other
        assert other.completion.tokens == other_alone.tokens
        assert [t for chunk in others for t in chunk.tokens] == other_alone.tokens

    def test_a_reader_that_waits_for_another_thread(self, engine: Engine) -> None:
        stream = engine.stream(PROMPT, **ENDLESS)
        with held(engine) as holder:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            assert holder.is_alive()
        assert engine._core.n_sequences == 0

    @pytest.mark.parametrize(
        "work",
        [
            lambda engine: engine._core.time_forwards([64], 64, 10**6),
            lambda engine: engine._core.time_forwards([1], 190_000, 1),
            lambda engine: engine.forward([1] * 190_000),
            lambda engine: engine.score([1] * 190_000),
        ],
    )
    def test_long_work(self, engine: Engine, work: Callable[[Engine], object]) -> None:
        """What `bench` does, and long texts: minutes, if it did not ask."""
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            work(engine)
        assert len(engine.generate(PROMPT, max_tokens=3).tokens) <= 3

    def test_loading(self) -> None:
        shape = random_shape()
        # Once more, as one that comes in a weak reference's callback is lost in there.
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.5)
        with pytest.raises(KeyboardInterrupt):
            random_model(shape, "f32", engine_options("cpu", 1, None, "f16"))
        signal.setitimer(signal.ITIMER_REAL, 0)

    def test_a_handler_that_closes_the_stream(self, engine: Engine) -> None:
        stream = engine.stream(PROMPT, **ENDLESS)
        signal.signal(signal.SIGALRM, lambda *_: stream.close())
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        tokens = [token for chunk in stream for token in chunk.tokens]
        completion = stream.completion
        assert completion.finish_reason in ("cancelled", "length")
        assert completion.tokens[: len(tokens)] == tokens

    def test_a_daemon_thread_may_generate_at_exit(self, model: Path) -> None:
        code = (
            "import gc, sys, threading, time; from sbd_engine import Engine\n"
            "engine = Engine(sys.argv[1], n_threads=2)\n"
            "work = lambda: engine.generate('a', max_tokens=100000, ignore_eos=True)\n"
            "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
            "time.sleep(0.05)\n"
            "gc.callbacks.append(lambda *_: time.sleep(0.02))"  # while Python ends: others may run
        )
        done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, cwd="/")
        assert (done.returncode, done.stderr) == (0, b"")


class TestAsync:
    def test_the_same_as_a_stream(self, engine: Engine) -> None:
        calls: list[dict[str, Any]] = [
            {"prompt": f"{PROMPT} {n}", "max_tokens": 20 + n, "ignore_eos": True} for n in range(8)
        ]
        alone = [engine.generate(**call) for call in calls]

        async def read(call: dict[str, Any]) -> tuple[list[Chunk], AsyncStream]:
            stream = engine.astream(**call)
            return [chunk async for chunk in stream], stream

        async def main() -> list[tuple[list[Chunk], AsyncStream]]:
            return await asyncio.gather(*map(read, calls))

        for (chunks, stream), expected in zip(asyncio.run(main()), alone, strict=True):
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert [t for chunk in chunks for t in chunk.tokens] == expected.tokens
            assert chunks[-1].finish_reason == "length"
            assert stream.completion.stats.nfe == expected.stats.nfe
        assert engine._core.n_sequences == 0

    def test_ends(self, engine: Engine) -> None:
        """Leaving the loop, aclose(), and cancelling the task."""

        async def main() -> None:
            async for _ in engine.astream(PROMPT, **ENDLESS):
                break
            assert engine._core.n_sequences == 0

            async with aclosing(engine.astream(PROMPT, **ENDLESS)) as stream:
                first = await anext(stream)
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.tokens[: len(first.tokens)] == first.tokens
            assert [chunk async for chunk in stream] == []
            assert engine._core.n_sequences == 0

            stream = engine.astream(PROMPT, **ENDLESS)

            async def read() -> list[Chunk]:
                return [chunk async for chunk in stream]

            readers = [asyncio.create_task(read()) for _ in range(3)]
            await asyncio.sleep(0.01)
            await stream.aclose()
            read_last = [chunks[-1:] for chunks in await asyncio.gather(*readers)]
            assert "cancelled" in [c.finish_reason for last in read_last for c in last]

            stream = engine.astream(PROMPT, **ENDLESS)
            readers = [asyncio.create_task(read()) for _ in range(2)]
            await asyncio.sleep(0.01)
            readers[0].cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            assert readers[0].cancelled()
            assert engine._core.n_sequences == 0
            assert stream.completion.finish_reason == "cancelled"

        asyncio.run(main())

    def test_a_closed_engine(self, model: Path) -> None:
        async def main() -> None:
            engine = Engine(model, n_threads=1)
            stream = engine.astream(PROMPT, **ENDLESS)
            await anext(stream)
            engine.close()
            with pytest.raises(SbdError, match="closed"):
                async for _ in stream:
                    pass
            assert [chunk async for chunk in stream] == []
            with pytest.raises(SbdError, match="closed"):
                engine.astream(PROMPT)

        asyncio.run(main())

    def test_no_memory_for_a_while(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever there is none on an event's way, each comes, once."""

        class Starved:  # an inbox; every other call finds none, before anything is taken
            def __init__(self, inbox: Any) -> None:
                self._inbox, self._calls = inbox, 0

            def __getattr__(self, name: str) -> Any:
                return getattr(self._inbox, name)

            def next(self, wait: bool) -> Any:
                self._calls += 1
                if self._calls % 2:
                    raise MemoryError
                return self._inbox.next(wait)

        calls = 0

        class StarvedQueue(asyncio.Queue[Any]):
            def put_nowait(self, item: Any) -> None:
                nonlocal calls
                calls += 1
                if item and calls % 4 == 1:
                    raise MemoryError
                super().put_nowait(item)
                if item and calls % 4 == 3:  # to wake its reader, when the event is there already
                    raise MemoryError

        async def main(engine: Engine) -> None:
            mailbox = engine._mailbox_here()
            mailbox.inbox = Starved(mailbox.inbox)  # type: ignore[assignment]
            streams = [engine.astream(PROMPT, max_tokens=n, ignore_eos=True) for n in (9, 30, 12)]
            for stream, text in zip(streams, expected, strict=True):
                tokens = [token async for chunk in stream for token in chunk.tokens]
                assert tokens == text
            assert calls > 30
            await engine.astream(PROMPT, **ENDLESS).aclose()

        monkeypatch.setattr(asyncio, "Queue", StarvedQueue)
        with Engine(model, n_threads=1) as engine:
            expected = [
                engine.generate(PROMPT, max_tokens=n, ignore_eos=True).tokens for n in (9, 30, 12)
            ]
            asyncio.run(asyncio.wait_for(main(engine), 20))
            assert engine._core.n_sequences == 0

    def test_delivered(self, engine: Engine) -> None:
        """Many texts in one event loop; of two whose taker fails, or that is cancelled, no other
        knows."""
        lengths = (9, 30, 12)
        expected = [engine.generate(PROMPT, max_tokens=n, ignore_eos=True).tokens for n in lengths]
        told: list[list[Chunk | Exception]] = [[], [], [], []]
        failed: list[str] = []

        def fails(_: object) -> None:
            raise ValueError("its taker's own")

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: failed.append(str(context["exception"])))
            engine.deliver(fails, PROMPT, **ENDLESS)
            cancelled = engine.deliver(told[3].append, PROMPT, **ENDLESS)
            for n, chunks in zip(lengths, told, strict=False):
                engine.deliver(chunks.append, PROMPT, max_tokens=n, ignore_eos=True)
            while engine._core.n_sequences > 1:
                await asyncio.sleep(0.001)
            cancelled.cancel()
            while engine._mailboxes:
                await asyncio.sleep(0.001)
                gc.collect()  # of the error's frames

        asyncio.run(asyncio.wait_for(main(), 20))
        for chunks, tokens in zip(told, expected, strict=False):
            assert [token for chunk in chunks for token in chunk.tokens] == tokens  # type: ignore[union-attr]
        last = told[3][-1]
        assert isinstance(last, Chunk) and last.finish_reason == "cancelled"
        assert failed == ["its taker's own"]

    def test_an_ended_text_keeps_no_file_open(self, engine: Engine) -> None:
        """Each began when none was on its way, and is still there."""

        async def main() -> None:
            kept = []
            for first in True, False, False, False, False:
                stream = engine.astream(PROMPT, max_tokens=2)
                over = asyncio.Event()
                text = engine.deliver(lambda _, over=over: over.set(), PROMPT, max_tokens=1)
                await over.wait()
                await stream.aclose()
                kept.append((stream, text))
                while engine._mailboxes:
                    await asyncio.sleep(0.001)
                if first:  # there may be garbage of others, and what is opened once
                    kept.clear()
                    gc.collect()
                    opened = len(os.listdir("/proc/self/fd"))
            assert len(os.listdir("/proc/self/fd")) == opened
            del kept

        asyncio.run(asyncio.wait_for(main(), 20))

    def test_an_engine_leaves_its_event_loop_other_turns(self, engine: Engine) -> None:
        taken: list[object] = []

        async def main() -> list[int]:
            texts = [engine.deliver(taken.append, PROMPT, **ENDLESS) for _ in range(16)]
            turns = []
            for _ in range(200):
                time.sleep(0.001)  # more come than a turn takes
                taken.clear()
                await asyncio.sleep(0)
                turns.append(len(taken))
            for text in texts:
                text.cancel()
            return turns

        assert 16 < max(asyncio.run(main())) <= 64

    def test_bad_input_and_no_event_loop(self, engine: Engine) -> None:
        with pytest.raises(SbdError, match="unknown argument"):
            engine.astream(PROMPT, gama=1)  # type: ignore[call-arg]
        with pytest.raises(RuntimeError, match="event loop"):
            engine.astream(PROMPT)
        gc.collect()
        assert engine._core.n_sequences == 0

    def test_the_event_loop_never_waits_for_a_forward(self, engine: Engine) -> None:
        """Starting, reading, cancelling and closing while another holds the engine."""

        async def main() -> None:
            with held(engine) as holder:
                stream = engine.astream(PROMPT, **ENDLESS)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(stream), 0.01)
                assert stream.completion.finish_reason == "cancelled"
                await engine.astream(PROMPT, **ENDLESS).aclose()
                assert engine._core.n_sequences == 0
                assert holder.is_alive()

        asyncio.run(main())

    @pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
    def test_an_event_loop_that_ends_frees_what_it_read(self, kind: str, engine: Engine) -> None:
        async def main() -> AsyncStream:
            stream = engine.astream(PROMPT, **ENDLESS)
            await anext(stream)
            return stream

        loop = importlib.import_module(kind).new_event_loop()
        stream = loop.run_until_complete(main())
        assert engine._core.n_sequences == 1
        loop.close()
        assert engine._core.n_sequences == 0
        assert not engine._mailboxes
        del stream

    def test_beside_threads(self, engine: Engine) -> None:
        alone = engine.generate(PROMPT, max_tokens=200, ignore_eos=True)
        texts: list[str] = []

        def work() -> None:
            texts.append(engine.generate(PROMPT, max_tokens=200, ignore_eos=True).text)

        async def main() -> str:
            stream = engine.astream(PROMPT, max_tokens=200, ignore_eos=True)
            return "".join([chunk.text async for chunk in stream])

        threads = [in_thread(work) for _ in range(3)]
        texts.append(asyncio.run(main()))
        for thread in threads:
            thread.join()
        assert texts == [alone.text] * 4
