"""The server as OpenAI's own client sees it: what it answers is the library's, bit for bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.serving import MESSAGES, Served, serve

from sbd_engine import Engine

openai = pytest.importorskip("openai")

PROMPT = "def add(a, b):"
LONG = {"max_tokens": 60, "temperature": 0.8, "ignore_eos": True}


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with Engine() as engine, serve(engine) as served:
        yield served


@pytest.fixture(scope="module")
def tiny(model: Path) -> Iterator[Served]:
    """A chat model of bytes: characters and stop strings come in pieces."""
    with Engine(model) as engine, serve(engine, "tiny", parallel=4, max_queue=500) as served:
        yield served


def client_of(served: Served, **settings: Any) -> Any:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, **settings)


def extra(options: dict[str, Any]) -> dict[str, Any]:
    """Options that OpenAI does not have go in the client's extra_body."""
    own = {k: v for k, v in options.items() if k in ("temperature", "max_tokens", "seed", "stop")}
    return {**own, "extra_body": {k: v for k, v in options.items() if k not in own}}


class TestCompletions:
    def test_text_is_the_librarys(self, demo: Served) -> None:
        done = demo.engine.generate(PROMPT, max_tokens=16)
        answer = client_of(demo).completions.create(model="demo", prompt=PROMPT, temperature=0)
        assert answer.choices[0].text == done.text
        assert answer.choices[0].finish_reason == done.finish_reason == "stop"
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == done.stats.prompt_tokens == 7
        assert answer.usage.completion_tokens == len(done.tokens)
        assert answer.usage.total_tokens == 7 + len(done.tokens)
        assert 1 <= answer.usage.nfe <= len(done.tokens)
        assert answer.usage.tokens_per_forward == pytest.approx(
            len(done.tokens) / answer.usage.nfe, abs=1e-4
        )

    def test_sixteen_tokens_where_none_are_named(self, demo: Served) -> None:
        answer = demo.post("/v1/completions", prompt=PROMPT, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"

    def test_temperature_is_one_and_the_seed_is_drawn_and_told(self, demo: Served) -> None:
        first, second = (
            demo.post("/v1/completions", prompt="import", max_tokens=40, ignore_eos=True)
            for _ in range(2)
        )
        assert first["seed"] != second["seed"]
        assert first["choices"][0]["text"] != second["choices"][0]["text"]
        done = demo.engine.generate(
            "import", max_tokens=40, ignore_eos=True, temperature=1.0, seed=first["seed"]
        )
        assert first["choices"][0]["text"] == done.text

    @pytest.mark.parametrize("decoder", [{"decoder": "sbd", "gamma": 0.2}, {"decoder": "ntp"}])
    def test_a_decoder_and_its_options_of_one_request(
        self, demo: Served, decoder: dict[str, Any]
    ) -> None:
        options = {**LONG, **decoder, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.1}
        answer = client_of(demo).completions.create(model="demo", prompt=PROMPT, **extra(options))
        done = demo.engine.generate(PROMPT, **options)
        assert answer.choices[0].text == done.text
        assert answer.usage.nfe == done.stats.nfe

    def test_prompts_of_every_kind(self, demo: Served) -> None:
        ids = demo.engine.tokenizer.encode(PROMPT)
        client = client_of(demo)
        text = demo.engine.generate(PROMPT, max_tokens=16).text
        for prompt, texts in (
            (ids, 1),
            ([PROMPT], 1),
            ([ids, ids], 2),
            ([PROMPT, "class Stack:"], 2),
        ):
            answer = client.completions.create(model="demo", prompt=prompt, temperature=0)
            assert [choice.index for choice in answer.choices] == list(range(texts))
            assert answer.choices[0].text == text
        assert answer.choices[1].text == demo.engine.generate("class Stack:", max_tokens=16).text
        assert answer.usage.prompt_tokens == 7 + len(demo.engine.tokenizer.encode("class Stack:"))

    def test_several_samples_of_each_prompt(self, demo: Served) -> None:
        answer = client_of(demo).completions.create(
            model="demo", prompt=["import", "class"], n=3, **extra({**LONG, "seed": 9})
        )
        expected = [
            demo.engine.generate(prompt, **LONG, seed=9, sample_index=sample).text
            for prompt in ("import", "class")
            for sample in range(3)
        ]
        assert [choice.text for choice in answer.choices] == expected
        assert len(set(expected)) == 6

    def test_stop_strings(self, demo: Served) -> None:
        for stop in ("return", ["zzz", "turn a"]):
            answer = client_of(demo).completions.create(
                model="demo", prompt=PROMPT, temperature=0, stop=stop
            )
            done = demo.engine.generate(PROMPT, max_tokens=16, stop=stop)
            assert answer.choices[0].text == done.text
            assert answer.choices[0].finish_reason == "stop"
            assert "return a" not in done.text

    def test_the_bias_of_a_token(self, demo: Served) -> None:
        token = demo.engine.generate(PROMPT, max_tokens=1).tokens[0]
        answer = client_of(demo).completions.create(
            model="demo", prompt=PROMPT, temperature=0, logit_bias={str(token): -100}
        )
        done = demo.engine.generate(PROMPT, max_tokens=16, logit_bias={token: -100})
        assert answer.choices[0].text == done.text
        assert done.tokens[0] != token


class TestLogprobs:
    def test_of_the_prompt_as_score_has_them(self, demo: Served) -> None:
        """As lm-eval asks for them."""
        ids = demo.engine.tokenizer.encode("def add(a, b):\n    return a + b")
        answer = demo.post(
            "/v1/completions",
            prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234,
        )  # fmt: skip
        told = answer["choices"][0]["logprobs"]
        scores = demo.engine.score(ids, top=1)
        assert told["token_logprobs"][:-1] == scores.logprobs
        piece = demo.engine.tokenizer.piece
        for table, best, token in zip(
            told["top_logprobs"][1:-1], scores.top[1:], ids[1:], strict=True
        ):
            (winner, logprob) = best[0]
            assert max(table.values()) == table[piece(winner)] == logprob
            assert piece(token) in table
        assert "".join(told["tokens"][:-1]) == "def add(a, b):\n    return a + b"
        assert told["text_offset"][:3] == [0, 3, 7]
        assert len(told["tokens"]) == len(ids) + 1

    def test_nothing_new_after_an_echo(self, demo: Served) -> None:
        answer = client_of(demo).completions.create(
            model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
        )
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason) == (PROMPT, "length")
        assert choice.logprobs.token_logprobs == demo.engine.score(PROMPT).logprobs
        assert answer.usage.completion_tokens == 0

    def test_of_new_tokens(self, demo: Served) -> None:
        answer = client_of(demo).completions.create(
            model="demo", prompt=PROMPT, logprobs=3, temperature=0, echo=True
        )
        done = demo.engine.generate(PROMPT, max_tokens=16, logprobs=3)
        assert done.logprobs
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text == PROMPT + done.text
        assert logprobs.token_logprobs[7:] == [each.logprob for each in done.logprobs]
        assert all(len(table) in (3, 4) for table in logprobs.top_logprobs[7:])

    def test_of_a_chat(self, tiny: Served) -> None:
        answer = client_of(tiny).chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=8, temperature=0,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        ids = tiny.engine.tokenizer.encode_chat(MESSAGES)
        done = tiny.engine.generate(ids, max_tokens=8, logprobs=2)
        assert done.logprobs
        content = answer.choices[0].logprobs.content
        assert [each.logprob for each in content] == [each.logprob for each in done.logprobs]
        assert [len(each.top_logprobs) for each in content] == [2] * len(done.tokens)
        for each in content:
            assert each.bytes is None or bytes(each.bytes).decode() == each.token


class TestChat:
    def test_answer_and_the_rest_of_the_context(self, tiny: Served) -> None:
        ids = tiny.engine.tokenizer.encode_chat(MESSAGES)
        answer = client_of(tiny).chat.completions.create(
            model="tiny", messages=MESSAGES, seed=3, extra_body={"ignore_eos": True}
        )
        done = tiny.engine.generate(
            ids, max_tokens=512 - len(ids), temperature=1.0, seed=3, ignore_eos=True
        )
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == done.text
        assert answer.usage.completion_tokens == 512 - len(ids)

    def test_no_longer_than_the_budget_holds(self, model: Path) -> None:
        with Engine(model, kv_budget=50_000) as engine, serve(engine) as served:
            assert engine.kv_positions < 400
            call = {"messages": MESSAGES, "ignore_eos": True, "seed": 1}
            chunks = served.stream("/v1/chat/completions", **call, n=3)
            ends = [c["choices"][0]["finish_reason"] for c in chunks]
            assert ends.count("length") == 3
            usage = served.post("/v1/chat/completions", **call)["usage"]
            assert usage["total_tokens"] == engine.kv_positions - 16  # a block, at its end

    def test_turns_and_template_arguments(self, tiny: Served) -> None:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hello ", "there")]},
            {"role": "assistant", "content": "Hi.", "refusal": None, "annotations": []},
            {"role": "user", "content": "<|eos|>"},
        ]  # fmt: skip
        told = tiny.post("/tokenize", messages=messages)["tokens"]
        plain = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "<|eos|>"},
        ]
        ids = tiny.engine.tokenizer.encode_chat(plain)
        assert told == ids
        assert tiny.engine.tokenizer.eos_token_ids[0] not in ids  # what a user spells is text
        answer = tiny.post(
            "/v1/chat/completions",
            messages=messages, max_completion_tokens=12, temperature=0,
            chat_template_kwargs={"enable_thinking": False},
        )  # fmt: skip
        done = tiny.engine.generate(ids, max_tokens=12)
        assert answer["choices"][0]["message"]["content"] == done.text

    def test_the_next_turn_reads_only_what_is_new(self, tiny: Served) -> None:
        client = client_of(tiny)
        messages = [{"role": "user", "content": "A long enough beginning of a chat. " * 3}]
        first = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0
        )
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And on."},
        ]
        second = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0
        )
        cached = second.usage.prompt_tokens_details.cached_tokens
        assert first.usage.prompt_tokens - 32 < cached < second.usage.prompt_tokens

    def test_thinking_stands_apart(self, tiny: Served, model: Path) -> None:
        """The template opens it; the tiny model never closes it."""
        template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
        with Engine(model) as engine, serve(engine, chat_template=template) as served:
            answer = served.post("/v1/chat/completions", messages=MESSAGES, max_tokens=9, seed=1)
            message = answer["choices"][0]["message"]
            ids = engine.tokenizer.encode_chat(MESSAGES, chat_template=template)
            done = engine.generate(ids, max_tokens=9, temperature=1.0, seed=1)
            assert message["reasoning_content"] == done.text.strip()
            assert message["content"] == ""

    def test_a_model_without_a_template(self, demo: Served) -> None:
        with pytest.raises(openai.BadRequestError, match="--chat-template") as refused:
            client_of(demo).chat.completions.create(model="demo", messages=MESSAGES)
        assert refused.value.code == "no_chat_template"
        assert refused.value.param == "messages"


class TestStreams:
    @pytest.mark.parametrize("seed", range(4))
    def test_pieces_make_the_whole(self, tiny: Served, seed: int) -> None:
        """The tiny model writes random bytes: characters that take several tokens among them."""
        options = {"max_tokens": 200, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        ids = tiny.engine.tokenizer.encode_chat(MESSAGES)
        done = tiny.engine.generate(ids, **options)
        stream = client_of(tiny).chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, **extra(options)
        )
        chunks = list(stream)
        pieces = [chunk.choices[0].delta.content for chunk in chunks]
        assert "".join(pieces) == done.text
        assert all(pieces[:-1])  # none is empty
        assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (
            len(chunks) - 1
        )
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].seed == seed
        assert len(chunks) > 20
        assert len({chunk.id for chunk in chunks}) == 1

    def test_a_stop_string_never_begins(self, tiny: Served) -> None:
        whole = tiny.engine.generate("Hello", max_tokens=120, temperature=1.0, seed=2).text
        stop = whole[40:46]
        chunks = tiny.stream("/v1/completions", prompt="Hello", max_tokens=120, seed=2, stop=stop)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == whole[: whole.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    def test_what_a_stop_string_held_back_comes_at_the_end(self, tiny: Served) -> None:
        done = tiny.engine.generate("Hello", max_tokens=50, temperature=1.0, seed=2)
        held = done.text[-3:] + "never"
        chunks = tiny.stream("/v1/completions", prompt="Hello", max_tokens=50, seed=2, stop=[held])
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == done.text

    def test_usage_comes_last_where_it_is_asked_for(self, demo: Served) -> None:
        stream = client_of(demo).completions.create(
            model="demo", prompt=PROMPT, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        *chunks, last = stream
        assert last.choices == []
        assert last.usage.prompt_tokens == 7
        assert last.usage.completion_tokens == len(
            demo.engine.generate(PROMPT, max_tokens=16).tokens
        )
        assert all(chunk.usage is None for chunk in chunks)

    def test_samples_come_interleaved(self, tiny: Served) -> None:
        chunks = tiny.stream("/v1/completions", prompt="Hello", n=3, seed=4, max_tokens=60)
        for sample in range(3):
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == sample]
            done = tiny.engine.generate(
                "Hello", max_tokens=60, temperature=1.0, seed=4, sample_index=sample
            )
            assert "".join(choice["text"] for choice in own) == done.text

    def test_logprobs_of_a_stream_are_those_of_the_whole(self, tiny: Served) -> None:
        asked = {"prompt": "Hello", "max_tokens": 60, "seed": 4, "logprobs": 2, "echo": True}
        whole = tiny.post("/v1/completions", **asked)["choices"][0]["logprobs"]
        told = [c["choices"][0]["logprobs"] for c in tiny.stream("/v1/completions", **asked)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for each in told for value in each[name]] == whole[name]

    def test_two_hundred_requests_in_random_arrival_and_some_that_leave(self, tiny: Served) -> None:
        """Bit-identical under load: streamed and not, sampled and not, whatever runs beside."""
        draw = random.Random(1)
        client = openai.AsyncOpenAI(base_url=tiny.url, api_key="none", max_retries=0)

        async def one(number: int) -> None:
            options: dict[str, Any] = {"max_tokens": 5 + number % 30}
            options |= {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0.0}
            if number % 3 == 0:
                options |= {"decoder": "ntp"}
            prompt = f"Number {number % 7} of them"
            await asyncio.sleep(draw.random() * 0.5)
            asked = {"model": "tiny", "prompt": prompt, **extra(options)}
            if number % 4:
                answer = await client.completions.create(**asked)
                text = answer.choices[0].text
            else:
                text = ""
                stream = await client.completions.create(**asked, stream=True)
                async for chunk in stream:
                    text += chunk.choices[0].text
                    if number % 8 == 0:  # leaves
                        await stream.close()
                        return
            expected[number] = {"prompt": prompt, **options}
            texts[number] = text

        async def everyone() -> None:
            # Left open, it would be closed as garbage, in whichever event loop runs then.
            async with client:
                await asyncio.gather(*map(one, range(200)))

        expected: dict[int, Any] = {}
        texts: dict[int, str] = {}
        asyncio.run(everyone())
        numbers = sorted(texts)
        assert len(numbers) == 175
        done = tiny.engine.generate_batch([expected[number] for number in numbers])
        assert [texts[number] for number in numbers] == [each.text for each in done]


class TestBlocks:
    def test_reveals_stand_apart_from_text(self, demo: Served) -> None:
        options = {"max_tokens": 40, "decoder": "sbd", "top_n": 2}
        asked = {"prompt": PROMPT, "temperature": 0, **options}
        chunks = demo.stream("/v1/completions", **asked, stream_options={"sbd_blocks": True})
        start, *blocks = [chunk["sbd"] for chunk in chunks if "sbd" in chunk]
        assert start == {
            "index": 0,
            "start": {
                "decoder": "sbd", "block_size": 8, "prompt_tokens": 7, "max_tokens": 40,
                "seed": start["start"]["seed"],
            },
        }  # fmt: skip
        assert all(chunk["choices"] == [] for chunk in chunks if "sbd" in chunk)
        with demo.engine.stream(PROMPT, **options) as stream:
            expected = list(stream)
        assert [block["forward"] for block in blocks] == [*range(1, len(expected) + 1)]
        committed = 0
        for block, chunk in zip(blocks, expected, strict=True):
            committed += len(chunk.tokens)
            assert block["committed"] == committed
            assert [
                (r["position"], r["token"], r["entropy"], r["probability"])
                for r in block["revealed"]
            ] == [tuple(reveal) for reveal in chunk.revealed]
            assert all(
                r["text"] == demo.engine.tokenizer.piece(r["token"]) for r in block["revealed"]
            )
        assert any(
            r["position"] >= block["committed"] for block in blocks for r in block["revealed"]
        )
        text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
        assert text == stream.completion.text

    def test_clients_that_do_not_ask_never_see_them(self, demo: Served) -> None:
        chunks = demo.stream("/v1/completions", prompt=PROMPT, decoder="sbd", temperature=0)
        assert not any("sbd" in chunk for chunk in chunks)
        assert all(chunk["choices"] for chunk in chunks)

    def test_the_client_of_openai_reads_them_as_extras(self, tiny: Served) -> None:
        stream = client_of(tiny).chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, max_tokens=8,
            stream_options={"sbd_blocks": True},
        )  # fmt: skip
        seen = [chunk.model_extra["sbd"] for chunk in stream if "sbd" in chunk.model_extra]
        assert seen[0]["start"]["block_size"] == 16
        assert seen[-1]["committed"] == 8


class TestTokens:
    def test_there_and_back(self, tiny: Served) -> None:
        text = "the café 🙂<|eos|>"
        answer = tiny.post("/tokenize", prompt=text)
        assert answer["tokens"] == tiny.engine.tokenizer.encode(text)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
        bare = tiny.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
        assert bare == answer["tokens"][1:]
        assert tiny.post("/detokenize", tokens=bare)["prompt"] == text

    def test_what_the_tokenizer_has(self, tiny: Served) -> None:
        _, _, info = tiny.ask("GET", "/tokenizer_info")
        assert (info["bos_token"], info["eos_token"]) == ("<|bos|>", "<|eos|>")
        assert info["eos_token_ids"] == tiny.engine.tokenizer.eos_token_ids
        assert "m.content" in info["chat_template"]


class TestModels:
    def test_list_and_one(self, tiny: Served) -> None:
        client = client_of(tiny)
        (only,) = client.models.list().data
        assert only.id == client.models.retrieve("tiny").id == "tiny"
        assert only.max_model_len == 512
        assert only.sbd["chat"] is True
        assert only.sbd["decoder"] == "sbd"
        assert {"sbd", "ntp"} <= set(only.sbd["decoders"])

    def test_one_that_is_not_there(self, tiny: Served) -> None:
        with pytest.raises(openai.NotFoundError, match="expected tiny") as error:
            client_of(tiny).chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert error.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client_of(tiny).models.retrieve("gpt-4")

    def test_none_named_is_the_only_one(self, tiny: Served) -> None:
        assert tiny.post("/v1/completions", prompt="a", max_tokens=1)["model"] == "tiny"
