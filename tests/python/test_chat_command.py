"""`sbd-engine chat`: turns, commands and files, by a pipe and at a terminal."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.command import CLEAR, Terminal, check_refused, run, run_here
from python.tiny_model import write_tiny_model

from sbd_engine import Engine

HELLO, AGAIN = "Hello there", "and again?"
SHORT = ("-n", 8, "--ignore-eos")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def turns(engine: Engine, *messages: str, system: str = "", **options: Any) -> list[str]:
    """The answers to these messages, by the engine."""
    options = {"max_tokens": 8, "ignore_eos": True, **options}
    said = [{"role": "system", "content": system}] if system else []
    for message in messages:
        said.append({"role": "user", "content": message})
        done = engine.generate(engine.tokenizer.encode_chat(said), **options)
        said.append({"role": "assistant", "content": done.text})
    return [each["content"] for each in said if each["role"] == "assistant"]


def piped(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *call: object
) -> tuple[int, str, str]:
    """The command of this process, with the text on standard input."""
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
    done = run_here(capsys, "chat", *call)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    before = signal.getsignal(signal.SIGTERM)
    yield lambda text, *call: piped(text, monkeypatch, capsys, *call)
    signal.signal(signal.SIGTERM, before)


def saved(path: Path) -> Any:
    return json.loads(path.read_text())


class TestPipe:
    def test_each_line_is_a_turn(self, engine: Engine, model: Path) -> None:
        done = run("chat", model, *SHORT, stdin=f"{HELLO}\n\n  {AGAIN}".encode())
        expected = "".join(f"{answer}\n" for answer in turns(engine, HELLO, AGAIN))
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")

    def test_system_and_options(self, engine: Engine, model: Path, pipe: Any) -> None:
        sampled = ("--temperature", 0.9, "--seed", 5, "--top-k", 7)
        code, output, errors = pipe(f"{HELLO}\n", model, *SHORT, "--system", "Be brief", *sampled)
        options = {"temperature": 0.9, "seed": 5, "top_k": 7}
        assert (code, errors) == (0, "")
        assert [output[:-1]] == turns(engine, HELLO, system="Be brief", **options)

    def test_messages_of_several_lines(self, model: Path, tmp_path: Path, pipe: Any) -> None:
        file = tmp_path / "a chat.json"
        lines = [
            "one \\",
            "two",
            '"""',
            "/three",
            "",
            "four",
            '"""',
            '"""/five"""',
            f"/save {file}",
        ]
        code, _, errors = pipe("\n".join(lines), model, *SHORT)
        assert (code, errors) == (0, f"note: 3 turns saved to {file}\n")
        said = [m["content"] for m in saved(file)["messages"] if m["role"] == "user"]
        assert said == ["one \ntwo", "/three\n\nfour", "/five"]

    def test_a_constraint_takes_the_place_of_another(self, model: Path, pipe: Any) -> None:
        lines = ['/set grammar=start: "aa"', "/set regex=b{2}", HELLO, "/set regex=", "/show"]
        code, output, errors = pipe("\n".join(lines), model)
        assert (code, output) == (0, "bb\n")
        assert 'grammar: start: "aa" -> none' in errors
        assert "regex: b{2} -> none" in errors

    def test_commands(self, engine: Engine, model: Path, tmp_path: Path, pipe: Any) -> None:
        file = tmp_path / "chat.json"
        lines = [
            *("/system Be brief", HELLO, "/clear", "/set decoder=ntp", "/set max-tokens=5", HELLO),
            *("/show", f"/save {file}", "/quit", "never said"),
        ]
        code, output, errors = pipe("\n".join(lines), model, *SHORT)
        (first,) = turns(engine, HELLO, system="Be brief")
        (second,) = turns(engine, HELLO, system="Be brief", decoder="ntp", max_tokens=5)
        assert (code, output) == (0, f"{first}\n{second}\n")
        assert "decoder: sbd -> ntp" in errors
        assert "max_tokens: 8 -> 5" in errors
        assert "system: Be brief" in errors
        assert "1 turn\n" in errors
        assert saved(file) == {
            "format": "sbd-engine chat 1",
            "model": model.name,
            "template_arguments": {},
            "options": {"max_tokens": 5, "ignore_eos": True, "decoder": "ntp"},
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": HELLO},
                {"role": "assistant", "content": second},
            ],
        }

    def test_a_saved_chat_goes_on(
        self, engine: Engine, model: Path, tmp_path: Path, pipe: Any
    ) -> None:
        file = tmp_path / "chat.json"
        options = ("--gamma", "inf", "--logit-bias", "70=2.5", "--stop", "7", *SHORT)
        call = (model, "--system", "Hi", "--template-arg", "date=[1]", *options)
        assert pipe(f"{HELLO}\n/save {file}", *call)[0] == 0
        before = saved(file)
        code, output, _ = pipe(f"/load {file}\n{AGAIN}\n/save {file}", model)
        asked = {"gamma": float("inf"), "logit_bias": {70: 2.5}, "stop": "7"}
        expected = turns(engine, HELLO, AGAIN, system="Hi", **asked)
        assert (code, output) == (0, expected[1] + "\n")
        after = saved(file)
        assert after["messages"][:3] == before["messages"]
        assert len(after["messages"]) == 5
        assert {k: v for k, v in after.items() if k != "messages"} == {
            k: v for k, v in before.items() if k != "messages"
        }

    def test_another_answer(self, engine: Engine, model: Path, pipe: Any) -> None:
        sampled = ("--temperature", 0.9, "--seed", 5)
        text = f"{HELLO}\n/regenerate\n/regenerate\n{AGAIN}\n"
        code, output, errors = pipe(text, model, *SHORT, *sampled)
        options = {"temperature": 0.9, "seed": 5}
        answers = [turns(engine, HELLO, sample_index=n, **options)[0] for n in range(3)]
        assert len({*answers}) == 3
        assert (code, errors) == (0, "")
        assert output.startswith("".join(f"{answer}\n" for answer in answers))

    def test_another_template(self, pipe: Any, tmp_path: Path) -> None:
        """Of the demo model, which has none."""
        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATE)
        code, output, _ = pipe(f"{HELLO}\n", "--chat-template", file, "-n", 8)
        with Engine() as engine:
            done = engine.generate(f"user: {HELLO}\nassistant:", max_tokens=8)
        assert (code, output) == (0, done.text + "\n")

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("/sav x", "unknown command '/sav': did you mean /save?"),
            ("/etc/passwd is what?", 'a message that begins with / is written in """'),
            ("/save", "expected /save FILE, got /save alone"),
            ("/clear all", "/clear takes nothing, got 'all'"),
            ("/regenerate", "/regenerate: nothing has been answered yet"),
            ("/set gamma", "expected /set NAME=VALUE, such as gamma=0.1, got 'gamma'"),
            ("/set gama=1", "unknown option 'gama': did you mean gamma or grammar?"),
            ("/set prompt=x", "unknown option 'prompt'"),
            ("/set gamma=often", "expected gamma as a number, got 'often'"),
            ("/set gamma=-1", "expected gamma >= 0, got -1"),
            ("/set ignore_eos=perhaps", "expected ignore_eos as True or False, got 'perhaps'"),
            ("/set max_tokens=0", "expected max_tokens >= 1, got 0"),
            ("/set max_tokens=1.5", "expected an integer max_tokens, got '1.5'"),
            ("/set horizon=2", 'horizon has no effect with decoder "sbd"'),
            ("/set top_k=5", "top_k has no effect at temperature 0"),
            ("/set logprobs=2", "logprobs has no effect in a chat"),
            ("/set logit_bias=x", "got 'x'"),
            ('"""open', 'expected """ at the end of a message'),
            ("/load nowhere.json", "nowhere.json: no such file"),
            ("/load /", "/: expected a saved chat, got a folder"),
            ("/save /nowhere/chat.json", "/nowhere/chat.json: cannot be written: No such file"),
        ],
    )
    def test_refused(self, line: str, complaint: str, model: Path, pipe: Any) -> None:
        check_refused(pipe(f"{line}\n{HELLO}\n", model, *SHORT), complaint)

    def test_input_that_is_no_text(self, model: Path) -> None:
        done = run("chat", model, *SHORT, stdin=b"/clear\n\xff\n")
        assert done.returncode == 2
        assert b"error: line 2 of standard input: expected UTF-8 text, got byte 0xff" in done.stderr

    def test_a_file_of_another_kind_stays(self, model: Path, tmp_path: Path, pipe: Any) -> None:
        file = tmp_path / "thesis.txt"
        file.write_text("years of work")
        check_refused(pipe(f"/save {file}", model), "is there and is no saved chat")
        assert file.read_text() == "years of work"

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--chat-template", "nowhere"], "nowhere: no such file"),
            (["--chat-template", "{none}"], "expected a Jinja template, got none in it"),
            (["--chat-template", "{open}"], "chat template failed: "),
            (
                ["--chat-template", "{good}", "--template-arg", "chat_template=rag"],
                "expected --chat-template or --template-arg chat_template=NAME, got both",
            ),
            (["--template-arg", "self=1"], "got 'self=1'"),
            (["--delay", 1], "--delay has no effect without --show-blocks"),
            (["--decoder", "ntp", "--gamma", 1], "--gamma has no effect with decoder"),
            (["--system", "x" * 600], "the context is full: this would be a conversation of 6"),
        ],
    )
    def test_refused_at_the_start(
        self, flags: list[object], complaint: str, model: Path, tmp_path: Path, pipe: Any
    ) -> None:
        files = {"none": "a text", "open": "{% if %}", "good": TEMPLATE}
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        paths = {name: tmp_path / name for name in files}
        check_refused(pipe("", model, *(str(f).format(**paths) for f in flags)), complaint)

    def test_no_template(self, plain_model: Path, pipe: Any) -> None:
        complaint = "no chat template: give one with --chat-template FILE, or complete texts with"
        check_refused(pipe(f"{HELLO}\n", plain_model), complaint)

    def test_a_full_context(self, model: Path, pipe: Any) -> None:
        code, output, errors = pipe(f"{HELLO}\n{'x' * 480}\n", model, *SHORT)
        assert (code, output.count("\n")) == (2, 1)
        assert re.search(r"a conversation of 5\d\d tokens, and the context has 512: /clear", errors)


WELL = {
    "format": "sbd-engine chat 1",
    "model": "x",
    "template_arguments": {},
    "options": {},
    "messages": [],
}
ASKED = {"role": "user", "content": "x"}


class TestFilesThatAreNoSavedChat:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "expected a saved chat, got no JSON"),
            ("{", "expected a saved chat, got no JSON"),
            ("[" * 100_000, "got no JSON: brackets nested too deeply"),
            ("[]", 'a JSON object with "format": "sbd-engine chat 1"'),
            ({"format": 2}, 'a JSON object with "format"'),
            ({"format": "sbd-engine chat 1"}, 'expected "model" in a saved chat, got none'),
            ({**WELL, "more": 1}, "unknown key 'more'"),
            ({**WELL, "options": []}, 'expected "options" as a JSON object, got []'),
            ({**WELL, "options": {"prompt": "x"}}, "unknown option 'prompt'"),
            ({**WELL, "options": {"gamma": [1]}}, "expected gamma as a number, got [1]"),
            ({**WELL, "options": {"horizon": 2}}, "horizon has no effect"),
            ({**WELL, "options": {"logit_bias": {"x": 1}}}, "got 'x=1'"),
            ({**WELL, "template_arguments": {"messages": 1}}, "got 'messages'"),
            ({**WELL, "messages": {}}, 'expected "messages" as a list'),
            ({**WELL, "messages": [{"role": "user"}]}, 'such as {"role": "user"'),
            ({**WELL, "messages": [{"role": "user", "content": 1}]}, "'content': 1"),
            ({**WELL, "messages": [ASKED]}, "expected the assistant's message at the end"),
            ({**WELL, "messages": [ASKED, ASKED]}, "got 'user' where 'assistant' belongs"),
            ({**WELL, "messages": [{"role": f"{CLEAR}", "content": ""}]}, "where 'user' belongs"),
            ({**WELL, "messages": [{**ASKED, "content": "\ud800"}]}, "as UTF-8 text"),
            (
                {**WELL, "messages": [ASKED, {"role": "assistant", "content": "x" * 600}]},
                "the context is full",
            ),
        ],
    )
    def test_refused(
        self, text: Any, complaint: str, model: Path, tmp_path: Path, pipe: Any
    ) -> None:
        file = tmp_path / "chat.json"
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        done = pipe(f"/load {file}\n", model)
        check_refused(done, complaint)
        assert str(file) in done[2]

    def test_nothing_has_changed_then(self, engine: Engine, model: Path, tmp_path: Path) -> None:
        file = tmp_path / "chat.json"
        file.write_text(json.dumps({**WELL, "options": {"temperature": 1, "horizon": 2}}))
        first, second = turns(engine, HELLO, AGAIN)
        chat = Terminal("chat", model, *SHORT)
        chat.wait_for("> ")
        chat.type(f"{HELLO}\n")
        chat.wait_for("tok/s")
        chat.type(f"/load {file}\n")
        chat.wait_for("error: ")
        chat.type(f"{AGAIN}\n/save {tmp_path / 'after.json'}\n/quit\n")
        assert chat.end() == 0
        after = saved(tmp_path / "after.json")
        assert after["options"] == {"max_tokens": 8, "ignore_eos": True}
        assert [m["content"] for m in after["messages"]] == [HELLO, first, AGAIN, second]


class TestTerminal:
    def test_turns_reuse_what_is_cached(self, engine: Engine, model: Path) -> None:
        chat = Terminal("chat", model, *SHORT)
        assert f"note: {model.name} on cpu" in chat.wait_for("> ")
        chat.type(f"{HELLO}\n")
        assert "cached" not in chat.wait_for("\n> ")
        chat.type(f"{AGAIN}\n")
        figures = chat.wait_for("prompt tokens cached")
        cached, of = map(int, re.findall(r"(\d+) of (\d+) prompt", figures)[0])
        said = [{"role": "user", "content": HELLO}]
        assert len(engine.tokenizer.encode_chat(said)) <= cached < of
        chat.wait_for("\n> ")
        chat.type("\x04")  # Ctrl-D
        assert chat.end() == 0
        assert "\x1b" not in chat.screen  # the model's texts have some

    def test_what_is_typed_can_be_edited_and_comes_again(self, model: Path, tmp_path: Path) -> None:
        pytest.importorskip("readline")
        chat = Terminal("chat", model, *SHORT)
        chat.wait_for("> ")
        chat.type("Hallo\x01\x1b[C\x04e\n")  # to the begin, one on, the next away, an e
        chat.wait_for("tok/s")
        chat.type("\x1b[A\n")  # what came before
        chat.wait_for("tok/s")
        chat.type(f"/sa\t {tmp_path / 'chat.json'}\n/quit\n")
        assert chat.end() == 0
        said = [m["content"] for m in saved(tmp_path / "chat.json")["messages"]]
        assert said[::2] == ["Hello", "Hello"]

    @pytest.mark.parametrize("columns", [40, 80])
    def test_help(self, columns: int, model: Path) -> None:
        chat = Terminal("chat", model, columns=columns)
        chat.wait_for("> ")
        chat.type("/help\n")
        chat.wait_for("Ctrl-C")
        chat.wait_for("stays.")
        chat.type("/quit\n")
        assert chat.end() == 0
        for name in ("/clear", "/regenerate", "/system TEXT", "/save FILE", "/load FILE", "/set"):
            assert f"\n{name}" in chat.screen
        assert max(map(len, chat.screen.split("/clear")[1].splitlines())) <= columns

    def test_errors_keep_the_chat(self, model: Path) -> None:
        chat = Terminal("chat", model, *SHORT)
        chat.wait_for("> ")
        chat.type(f"{'x' * 600}\n")
        assert "and the context has 512: shorten it" in chat.wait_for("\n> ")
        chat.type(f"/nothing\n{HELLO}\n")
        chat.wait_for("unknown command '/nothing'")
        chat.wait_for("tok/s")
        chat.type("/quit\n")
        assert chat.end() == 0

    def test_an_answer_that_fills_the_context(self, model: Path) -> None:
        chat = Terminal("chat", model, "--ignore-eos", "--n-ctx", 64)
        chat.wait_for("> ")
        chat.type("hi\n")
        said = r"cut off: (\d+) tokens and (\d+) of the answer, and the context has 64: /clear"
        assert re.search(said, chat.wait_for("forgets what was said"))
        chat.type("/clear\n/quit\n")
        assert chat.end() == 0

    def test_blocks(self, model: Path) -> None:
        chat = Terminal("chat", model, "-n", 40, "--ignore-eos", "--show-blocks", TERM="xterm")
        chat.wait_for("> ")
        chat.type(f"{HELLO}\n")
        assert "\u2591" * 7 in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chat.wait_for("tok/s"))
        chat.type("\n/quit\n")
        assert chat.end() == 0


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A chat whose answers take minutes."""
    model = write_tiny_model(tmp_path_factory.mktemp("endless"), n_ctx=200_000)
    return ("chat", model, "-n", 190_000, "--ignore-eos", "--decoder", "ntp")


class TestInterrupt:
    def test_an_answer_is_stopped_and_the_chat_goes_on(
        self, endless: tuple[object, ...], tmp_path: Path
    ) -> None:
        chat = Terminal(*endless)
        chat.wait_for("> ")
        chat.type(f"{HELLO}\n")
        chat.wait_for("\n")
        chat.wait_for_length(300)
        chat.interrupt()
        chat.wait_for("tok/s")
        chat.type("/set max_tokens=3\n")
        chat.wait_for("190000 -> 3")
        chat.type(f"{AGAIN}\n")
        chat.wait_for("3 tokens, ")
        chat.type(f"/save {tmp_path / 'chat.json'}\n")
        chat.wait_for("2 turns saved")
        chat.wait_for("\n> ")
        chat.type("half a mess")
        chat.wait_for("half a mess")
        chat.interrupt()  # only the line
        chat.wait_for("\n> ")
        chat.interrupt()
        assert "Ctrl-C once more ends the chat" in chat.wait_for("\n> ")
        chat.interrupt()
        assert chat.end() == 130
        assert "Traceback" not in chat.screen
        answer = saved(tmp_path / "chat.json")["messages"][1]["content"]
        assert 10 < len(answer) < 190_000

    def test_termination_ends_it(self, endless: tuple[object, ...]) -> None:
        chat = Terminal(*endless)
        chat.wait_for("> ")
        chat.type(f"{HELLO}\n")
        chat.wait_for("e")
        chat.process.send_signal(signal.SIGTERM)
        assert chat.end() == 130
        assert "Traceback" not in chat.screen


def test_a_chat_model_without_its_template_gets_a_hint(
    model: Path, plain_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = b"note: this is a chat model: --chat puts the prompt into its template"
    call = ("run", "-p", "x", "-n", 2)
    assert hint in run_here(capsys, *call, "-m", model).stderr
    for others in (["-m", plain_model], ["-m", model, "--chat"], ["-m", model, "--json"]):
        assert hint not in run_here(capsys, *call, *others).stderr
    by_hand = ("run", model, "-p", "<|system|>user\nx<|system|>assistant\n", "-n", 2)
    assert hint not in run_here(capsys, *by_hand).stderr


def test_a_real_conversation(real_model: Path) -> None:
    done = run("chat", real_model, "-n", 40, stdin=b"What is the capital of Japan?\nAnd of France?")
    assert done.stdout.decode().splitlines()[0] == "The capital of Japan is Tokyo."
    assert "Paris" in done.stdout.decode()
    assert done.returncode == 0
