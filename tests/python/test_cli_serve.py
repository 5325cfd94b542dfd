"""`sbd-engine serve` as a process, and what it refuses before it listens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from python.command import COMMAND, call_here, check_refused
from python.serving import until

pytest.importorskip("fastapi")


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[tuple[Any, str, Any]]:
    """The process, where it serves, and what reads its log: a pipe would be full some time."""
    with tempfile.NamedTemporaryFile("a") as log:
        process = subprocess.Popen(
            [COMMAND, "serve", "--port", "0", *map(str, arguments)],
            stderr=log.fileno(),
            env=os.environ | environment,
        )

        def read() -> str:
            return Path(log.name).read_text()

        try:
            until(lambda: "Ctrl-C ends" in read())
            (url,) = re.findall(r"serving \S+ at (http://\S+)", read())
            yield process, url, read
        finally:
            process.kill()
            process.wait()


def ask(url: str, body: Any = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_the_demo_model_answers_until_a_signal() -> None:
    with serving("--alias", "mine") as (process, url, log):
        assert ask(f"{url}/v1/models")["data"][0]["id"] == "mine"
        body = {"prompt": "def add(a, b):", "temperature": 0}
        answer = ask(f"{url}/v1/completions", body)
        assert answer["choices"][0]["text"] == "\n    return a + b"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "POST /v1/completions 200 " in log()
        assert "return" not in log()


def test_a_second_signal_ends_what_runs(model: Path) -> None:
    with serving(model, "--threads", 1) as (process, url, log):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as caller:
            body = json.dumps({"prompt": "a", "n": 100, "max_tokens": 400, "stream": True}).encode()
            caller.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            assert caller.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert "Traceback" not in log()


def test_keys_of_the_environment_and_a_template(plain_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with serving(plain_model, "--chat-template", template, SBD_API_KEY="k1") as (_, url, _):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/v1/models")
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        answer = ask(f"{url}/v1/chat/completions", body, Authorization="Bearer k1")
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["prompt_tokens"] == 6  # without BOS: a template writes its own


def test_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.write_text("\n")
    text.write_text("no template")
    missing = tmp_path / "missing"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, complaint in (
            (["--port", port], f"cannot listen at --host 127.0.0.1 --port {port}: Address already"),
            (["--host", "no.such.host.invalid"], "cannot listen at --host no.such.host.invalid"),
            (["--port", "70000"], "--port"),
            (["--parallel", "0"], "--parallel"),
            (["--max-queue", "-1"], "--max-queue"),
            (["--timeout", "0"], "--timeout"),
            (["--api-key-file", empty], f"{empty}: expected a key, got none"),
            (["--api-key-file", missing], f"{missing}: no such file"),
            (["--chat-template", text], f"--chat-template {text}: expected a Jinja template"),
            (["--alias", ""], "--alias"),
            ([missing], f"{missing}: no such file"),
        ):
            check_refused(call_here(capsys, "serve", *arguments), complaint)
    monkeypatch.setenv("SBD_API_KEY", "")
    check_refused(call_here(capsys, "serve"), "SBD_API_KEY: expected a key, got none")
    check_refused(call_here(capsys, "serve", "--api-key-file", text), "got both")


def test_without_its_extra() -> None:
    """Other commands need none of it."""
    names = ("fastapi", "uvicorn", "prometheus_client", "starlette")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names})); "
        "from sbd_engine.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )

    def call(*arguments: str) -> Any:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    done = call("serve")
    assert done.returncode == 2
    assert done.stderr == (
        "error: serve needs uvicorn, which is not installed: pip install 'sbd-engine[serve]'\n"
    )
    assert call("serve", "--help").returncode == 0
    assert call("inspect").returncode == 0
