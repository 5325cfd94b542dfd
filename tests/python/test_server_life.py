"""The server among clients that leave, stall, crowd and pry."""

from __future__ import annotations

import http.client
import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.serving import Served, serve, until
from python.tiny_model import write_tiny_model

from sbd_engine import Engine
from sbd_engine.server import listening
from sbd_engine.server.edge import Limits

COMPLETIONS = "/v1/completions"
ENDLESS: dict[str, Any] = {
    "prompt": "Hello", "ignore_eos": True, "max_tokens": 100_000, "decoder": "ntp",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Of so long a context that a text does not end by itself."""
    model = write_tiny_model(tmp_path_factory.mktemp("tiny"), n_ctx=200_000)
    with Engine(model, n_threads=1) as engine:
        yield engine


@pytest.fixture
def tiny(engine: Engine) -> Iterator[Served]:
    with serve(engine, "tiny", parallel=2, max_queue=2) as served:
        yield served
    assert engine._core.n_sequences == 0


class Caller:
    """Sends a request by hand, and reads as it likes."""

    def __init__(self, served: Served, **fields: Any) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(20)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read waits
        self.socket.connect(("127.0.0.1", served.port))
        data = json.dumps({**ENDLESS, **fields}).encode()
        self.socket.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
            % (COMPLETIONS.encode(), len(data), data)
        )

    def leave(self) -> None:
        self.socket.close()


def running(engine: Engine) -> int:
    return engine._core.n_sequences


class TestLeaving:
    @pytest.mark.parametrize("stream", [False, True])
    def test_frees_the_sequence(self, tiny: Served, stream: bool) -> None:
        caller = Caller(tiny, stream=stream)
        until(lambda: running(tiny.engine) == 1)
        if stream:
            assert b"data: " in caller.socket.recv(4096) + caller.socket.recv(4096)
        caller.leave()
        until(lambda: running(tiny.engine) == 0)
        until(lambda: tiny.metric("sbd_texts_total", outcome="cancelled") == 1)
        assert tiny.metric("sbd_http_answers_total", path=COMPLETIONS, status="left") == 1
        assert tiny.metric("sbd_texts_running") == 0
        assert not stream or tiny.metric("sbd_completion_tokens_total") >= 1
        assert tiny.post(COMPLETIONS, prompt="Hello", max_tokens=4)["choices"]

    def test_before_its_turn(self, tiny: Served) -> None:
        """Whoever waits and leaves takes no turn."""
        first, second = (Caller(tiny, stream=True) for _ in range(2))
        until(lambda: running(tiny.engine) == 2)
        third = Caller(tiny, stream=True)
        until(lambda: tiny.gate.waiting == 1)
        third.leave()
        until(lambda: tiny.gate.waiting == 0)
        first.leave()
        second.leave()
        until(lambda: running(tiny.engine) == 0)
        assert tiny.metric("sbd_texts_total") == 2

    def test_a_reader_who_takes_nothing(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others go on; when it has taken nothing for long, it is as good as gone."""
        monkeypatch.setattr(listening, "_PATIENCE_SECONDS", 0.3)
        with serve(engine, send_buffer=4096) as served:
            caller = Caller(served, stream=True, logprobs=5)
            until(lambda: running(engine) == 1)
            assert served.post(COMPLETIONS, prompt="Hello", max_tokens=4)["choices"]
            until(lambda: running(engine) == 0)
            assert served.metric("sbd_texts_total", outcome="cancelled") == 1
            caller.leave()


class TestQueue:
    def test_who_waits_and_who_is_refused(self, tiny: Served) -> None:
        callers = [Caller(tiny, stream=True) for _ in range(4)]
        until(lambda: tiny.gate.waiting == 2)
        assert tiny.metric("vllm:num_requests_waiting") == 2
        assert tiny.metric("vllm:num_requests_running") == 2
        status, headers, answer = tiny.ask("POST", COMPLETIONS, ENDLESS)
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["code"] == "queue_full"
        assert answer["error"]["type"] == "rate_limit_error"
        assert "2 texts are generated and 2 wait" in answer["error"]["message"]
        # Counted behind the answer, whose reader may be the faster one.
        until(lambda: tiny.metric("sbd_requests_refused_total", status="429") == 1)
        callers.pop(0).leave()
        until(lambda: tiny.gate.waiting == 1)
        for caller in callers:
            caller.leave()
        until(lambda: running(tiny.engine) == 0)

    def test_several_texts_of_one_request(self, tiny: Served) -> None:
        """More than run together: in turn."""
        answer = tiny.post(COMPLETIONS, prompt="Hello", max_tokens=8, n=7, seed=1)
        alone = [
            tiny.engine.generate("Hello", max_tokens=8, temperature=1, seed=1, sample_index=i).text
            for i in range(7)
        ]
        assert [choice["text"] for choice in answer["choices"]] == alone
        assert tiny.metric("sbd_texts_waiting") == 0

    def test_what_takes_too_long(self, engine: Engine) -> None:
        with serve(engine, limits=Limits(request_seconds=0.2)) as served:
            status, _, answer = served.ask("POST", COMPLETIONS, ENDLESS)
            assert (status, answer["error"]["code"]) == (504, "timeout")
            _, _, text = served.ask("POST", COMPLETIONS, {**ENDLESS, "stream": True})
            last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
            assert last["error"]["code"] == "timeout"
            until(lambda: running(engine) == 0)


class TestBodies:
    def test_too_large(self, engine: Engine) -> None:
        with serve(engine, limits=Limits(body_bytes=1000)) as served:
            status, _, answer = served.ask("POST", COMPLETIONS, b"x" * 1001)
            assert (status, answer["error"]["message"]) == (
                413, "expected a body of at most 1000 bytes, got more",
            )  # fmt: skip
            # Its client is told though it goes on sending, all of it.
            status, _, _ = served.ask("POST", COMPLETIONS, b"x" * 5_000_000)
            assert status == 413
            # One whose length nobody knows.
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
            connection.request("POST", COMPLETIONS, iter([b"x" * 600] * 3), encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})  # fmt: skip
            assert connection.getresponse().status == 413
            connection.close()

    def test_a_gigabyte_that_is_only_announced(self, tiny: Served) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as caller:
            caller.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n"
                           % COMPLETIONS.encode())  # fmt: skip
            assert caller.recv(4096).startswith(b"HTTP/1.1 413 ")

    def test_half_sent(self, engine: Engine) -> None:
        with serve(engine, limits=Limits(body_seconds=0.1)) as served:
            with socket.create_connection(("127.0.0.1", served.port), timeout=20) as caller:
                caller.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"
                               % COMPLETIONS.encode())  # fmt: skip
                assert caller.recv(4096).startswith(b"HTTP/1.1 408 ")
            until(lambda: served.metric("sbd_requests_refused_total", status="408") == 1)

    def test_connections_for_nothing_are_closed(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listening, "_PATIENCE_SECONDS", 0.2)
        with serve(engine) as served:
            for sent in (b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /"):
                with socket.create_connection(("127.0.0.1", served.port), timeout=20) as caller:
                    caller.sendall(sent)
                    while caller.recv(4096):
                        pass

    def test_what_is_no_http(self, tiny: Served) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as caller:
            caller.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
            answer = b"".join(iter(lambda: caller.recv(4096), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize("piece", [b"a", b"a: b\r\n"], ids=["a name", "many"])
    def test_a_head_without_end(self, piece: bytes, tiny: Served) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as caller:
            caller.sendall(b"GET /health HTTP/1.1\r\n")
            for _ in range(100):
                caller.sendall(piece * (20_000 // len(piece)))
                if select.select([caller], [], [], 0.05)[0]:
                    break
            assert caller.recv(4096).startswith(b"HTTP/1.1 400 ")

    def test_a_client_that_offers_another_protocol(self, tiny: Served) -> None:
        """As those of Java do, behind a body that counts."""
        body = b'{"prompt": "Hello", "max_tokens": 2}'
        head = (
            b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings, close\r\n"
            b"upgrade: h2c\r\ncontent-length: %d\r\n\r\n" % (COMPLETIONS.encode(), len(body))
        )
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as caller:
            caller.sendall(head)
            time.sleep(0.05)
            caller.sendall(body)
            answer = b"".join(iter(lambda: caller.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 ") and b'"completion_tokens":2' in answer

    def test_a_thousand_connections(self, tiny: Served) -> None:
        listening.allow_files()
        callers = [socket.create_connection(("127.0.0.1", tiny.port)) for _ in range(1000)]
        assert tiny.post(COMPLETIONS, prompt="Hello", max_tokens=2)["choices"]
        for caller in callers:
            caller.close()


@pytest.fixture(scope="module")
def locked(engine: Engine) -> Iterator[Served]:
    origins = ["https://example.org"]
    with serve(engine, "tiny", keys=["first", "second-key"], cors=origins) as served:
        yield served


class TestDoor:
    def test_keys(self, locked: Served) -> None:
        for key in ("first", "second-key"):
            assert locked.ask("GET", "/v1/models", authorization=f"Bearer {key}")[0] == 200
        for headers in (
            {},
            {"authorization": "Bearer second"},
            {"authorization": "Basic first"},
            {"authorization": "Bearer first\xe9"},
            {"authorization": "first"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics", "/nowhere", "/tokenizer_info"):
                status, told, answer = locked.ask("GET", path, **headers)
                assert (status, told["www-authenticate"]) == (401, "Bearer")
                assert answer["error"]["code"] == "invalid_api_key"
        assert locked.ask("GET", "/health")[0] == 200

    def test_openais_client_says_so(self, locked: Served) -> None:
        openai = pytest.importorskip("openai")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=locked.url, api_key="wrong").models.list()
        assert openai.OpenAI(base_url=locked.url, api_key="first").models.list().data

    def test_pages_of_others(self, locked: Served, tiny: Served) -> None:
        """A browser sends what any page wants; ours is asked first where that is allowed."""
        status, _, answer = tiny.ask("POST", COMPLETIONS, ENDLESS, origin="https://example.org")
        assert (status, answer["error"]["code"]) == (403, "origin")
        assert "--cors-origin" in answer["error"]["message"]
        own = f"http://127.0.0.1:{tiny.port}"
        status, headers, _ = tiny.ask("GET", "/v1/models", origin=own)
        assert status == 200
        assert "access-control-allow-origin" not in headers
        status, headers, _ = locked.ask(
            "OPTIONS", COMPLETIONS,
            origin="https://example.org", access_control_request_method="POST",
            access_control_request_headers="authorization",
        )  # fmt: skip
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://example.org"
        status, headers, _ = locked.ask(
            "GET", "/v1/models", origin="https://example.org", authorization="Bearer first"
        )
        assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
        other = locked.ask(
            "GET", "/v1/models", origin="https://example.com", authorization="Bearer first"
        )
        assert other[0] == 403

    def test_a_request_has_an_id(self, tiny: Served) -> None:
        _, headers, answer = tiny.ask("POST", COMPLETIONS, {"prompt": "a"}, x_request_id="my-1.id")
        assert headers["x-request-id"] == "my-1.id"
        assert answer["id"] == "cmpl-my-1.id"
        _, headers, _ = tiny.ask("GET", "/nowhere", x_request_id="not one\tof ours")
        assert len(headers["x-request-id"]) == 24


class TestLog:
    def test_figures_and_never_a_prompt(
        self, tiny: Served, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "sbd_engine.server")
        tiny.ask("POST", COMPLETIONS, {"prompt": "Secret", "max_tokens": 3, "decoder": "ntp"})
        tiny.ask("POST", COMPLETIONS, {"prompt": "Secret", "gamma": "Secret"})
        tiny.ask("GET", "/v1/models?key=Secret")
        tiny.ask("GET", "/no%0Awhere%1b[2J")
        until(lambda: len(caplog.messages) == 4)
        first, second, third, fourth = caplog.messages
        assert first.startswith("POST /v1/completions 200 ")
        assert first.endswith(" prompt=7 cached=0 tokens=3 nfe=3")
        assert second.startswith("POST /v1/completions 400 ")
        assert third.startswith("GET /v1/models 200 ")
        assert fourth.startswith(r"GET /no\nwhere\x1b[2J 404 ")
        assert "Secret" not in caplog.text


class TestMetrics:
    def test_they_add_up(self, engine: Engine) -> None:
        with serve(engine, "tiny") as served:
            before = engine.usage
            answers = [
                served.post(COMPLETIONS, prompt="Hello there, number " * 3, max_tokens=n, seed=n)
                for n in (3, 5, 8)
            ]
            served.refuse(COMPLETIONS, prompt="a", temperature=-1)
            usages = [answer["usage"] for answer in answers]
            prompts = sum(usage["prompt_tokens"] for usage in usages)
            cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
            assert cached > 0
            assert served.metric("sbd_prompt_tokens_total") == prompts
            assert served.metric("sbd_cached_tokens_total") == cached
            assert served.metric("sbd_completion_tokens_total") == 3 + 5 + 8
            nfe = sum(usage["nfe"] for usage in usages)
            assert served.metric("sbd_nfe_total") == nfe
            forwards = served.metric("sbd_forwards_total") - before.forwards
            assert nfe <= forwards <= nfe + 3
            rows = served.metric("sbd_forward_rows_total") - before.rows
            assert rows >= forwards
            assert served.metric("sbd_forward_prompt_rows_total") - before.prompt_rows == (
                prompts - cached
            )
            for name in ("sbd_prefix_cache", "vllm:prefix_cache"):
                assert served.metric(f"{name}_queries_total") - before.prompt_tokens == prompts
                assert served.metric(f"{name}_hits_total") - before.cached_tokens == cached
            assert served.metric("sbd_texts_total", outcome="length", model_name="tiny") == 3
            assert served.metric("vllm:request_success_total", finished_reason="length") == 3
            assert served.metric("sbd_http_answers_total", status="400") == 1
            for name in ("sbd", "vllm"):
                colon = ":" if name == "vllm" else "_"
                first = f"{name}{colon}time_to_first_token_seconds"
                assert served.metric(f"{first}_count") == 3
                assert (
                    0 < served.metric(f"{first}_sum") < served.metric("sbd_request_seconds_sum") * 3
                )
            assert served.metric("sbd_tokens_per_forward_count") == 3
            assert served.metric("sbd_kv_used_bytes") == 0
            assert served.metric("sbd_kv_cached_bytes") > 0
            assert served.metric("vllm:kv_cache_usage_perc") == 0
            assert served.metric("sbd_kv_budget_bytes") == engine.kv_budget
            caller = Caller(served)
            until(lambda: served.metric("vllm:kv_cache_usage_perc") > 0)
            caller.leave()
            until(lambda: served.metric("sbd_kv_used_bytes") == 0)


class TestFaults:
    def test_an_engine_that_closes(self, model: Path) -> None:
        """The stream says that it broke off, and later requests are refused."""
        with Engine(model) as engine, serve(engine) as served:
            caller = Caller(served, stream=True, max_tokens=500, n=50)
            told = caller.socket.recv(1 << 12)
            engine.close()
            while not re.search(rb"closed[^\n]*\n", told):
                told += (data := caller.socket.recv(1 << 16))
                assert data
            assert b"[DONE]" not in told
            last = told.split(b"data: ")[-1].partition(b"\n")[0]
            assert "closed" in json.loads(last)["error"]["message"]
            assert served.ask("POST", COMPLETIONS, {"prompt": "a"})[0] == 500
            caller.leave()

    def test_a_fault_of_ours_is_told_in_openais_form(
        self, tiny: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Engine, "check", lambda *_, **__: 1 / 0)
        status, _, answer = tiny.ask("POST", COMPLETIONS, {"prompt": "a"})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "division" not in answer["error"]["message"]


class TestDraining:
    def test_lets_run_what_runs_and_nobody_in(self, engine: Engine) -> None:
        with serve(engine) as served:
            told: list[Any] = []
            body = {**ENDLESS, "max_tokens": 12000}
            reader = threading.Thread(
                target=lambda: told.append(served.ask("POST", COMPLETIONS, body))
            )
            reader.start()
            until(lambda: running(engine) == 1)
            served.server.handle_exit(15, None)
            status, headers, answer = served.ask("POST", COMPLETIONS, {"prompt": "a"})
            assert (status, answer["error"]["code"]) == (503, "draining")
            assert headers["retry-after"]
            assert served.ask("GET", "/health")[0] == 503
            reader.join()
            assert told[0][0] == 200
            assert told[0][2]["usage"]["completion_tokens"] == 12000
            until(lambda: served.server.should_exit)
            assert not served.server.force_exit

    def test_a_second_signal_ends_at_once(self, engine: Engine) -> None:
        with serve(engine) as served:
            caller = Caller(served, stream=True)
            until(lambda: running(engine) == 1)
            served.server.handle_exit(15, None)
            time.sleep(0.15)
            assert running(engine) == 1
            served.server.handle_exit(15, None)
            until(lambda: running(engine) == 0, seconds=2)
            while caller.socket.recv(1 << 16):
                pass
