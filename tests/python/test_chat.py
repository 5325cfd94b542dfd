"""Chat templates: the text and tokens that transformers gives, and a bound on what one takes."""

from __future__ import annotations

import gc
import inspect
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from python.tiny_model import BOS, EOS, MASK, SYSTEM, byte_tokenizer

from sbd_engine.convert.checkpoint import Checkpoint
from sbd_engine.convert.tokenizer import load_tokenizer, tokenizer_metadata
from sbd_engine.errors import SbdError, SbdTypeError, SbdValueError
from sbd_engine.template_process import TemplateProcess
from sbd_engine.tokenizer import Tokenizer

# Each in the style of a family's own: what it uses of Jinja, and of what templates are given.
CHATML = """{% for message in messages %}{{ '<|system|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{% set said = message['content'] | trim %}
{{- said + eos_token }}{% endgeneration %}{% else %}{{ message['content'] | trim }}{% endif %}
{{- '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|system|>assistant\n' }}{% endif %}{{ said is defined }}"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = '' %}{% endif %}
{{- 'Today Date: ' + date_string + '\n' + system_message }}
{%- if tools is not none %}{% for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{% endfor %}
    {%- else %}{{- message['role'] + ':' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}"""
QWEN = """{%- if tools %}{{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{% endfor %}{{- '\n</tools>' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}
    {%- else %}{% set content = '' %}{% endif %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|system|>' + message.role + '\n' }}
    {%- if reasoning and loop.index0 > ns.last %}{{- "<think>" + reasoning }}{% endif %}
    {{- content + '\n' }}
    {%- if loop.last %}{% continue %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|system|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}
{{ documents is none }}{{ unk_token is defined }}{{ pad_token }}{{ image_token }}"""
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL}

USER = {"role": "user", "content": ' Grüße, "you" & <me> 🙂 \n'}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
CALL = {"function": {"name": "add", "arguments": {"b": [1, 2.5, None], "a": "ü<&>'"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Größe"}}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": [USER, ANSWER, USER], "add_generation_prompt": False},
    {"messages": [USER], "enable_thinking": False, "date_string": "26 Jul 2024"},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "user", "content": "3", "thinking": "so"},
        ],
        "tools": [TOOL],
        "documents": [{"title": "t", "text": "x"}],
    },
]
TOKENS = {
    "bos_token": BOS,
    "eos_token": {"content": EOS, "special": True, "__type": "AddedToken"},
    "pad_token": MASK,
    "image_token": SYSTEM,
    "additional_special_tokens": [SYSTEM],
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def checkpoint(folder: Path, **settings: Any) -> Path:
    """A checkpoint's tokenizer."""
    folder.mkdir(parents=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS | settings))
    return folder


def converted(folder: Path) -> Tokenizer:
    """The tokenizer of its model file."""
    loaded = load_tokenizer(Checkpoint(folder, [], {"vocab_size": 272}, {}), pytest.fail)
    metadata = tokenizer_metadata(loaded, 272, warn=pytest.fail)
    return Tokenizer(metadata, [loaded.ids[EOS]], loaded.ids[MASK])


def with_template(template: str, **metadata: Any) -> Tokenizer:
    keys = {
        "tokenizer.huggingface.json": byte_tokenizer().to_str(),
        "tokenizer.chat_template": template,
    }
    return Tokenizer(keys | metadata, [byte_tokenizer().token_to_id(EOS)])


def pair(folder: Path, **settings: Any) -> tuple[Tokenizer, Any]:
    """Ours and transformers' of one checkpoint."""
    transformers = pytest.importorskip("transformers")
    path = checkpoint(folder, **settings)
    return converted(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return pair(tmp_path_factory.mktemp("chat") / "model", chat_template="{{ messages }}")


class TestAsTransformers:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_same_text_and_tokens(self, name: str, both: tuple[Tokenizer, Any]) -> None:
        ours, theirs = both
        for conversation in CONVERSATIONS:
            call = {"add_generation_prompt": True, **conversation, "chat_template": TEMPLATES[name]}
            if name == "mistral" and "tools" in call:
                continue  # a message without content: neither renders it
            expected = theirs.apply_chat_template(call["messages"], tokenize=False, **left(call))
            assert ours.apply_chat_template(**call) == expected
            ids = theirs.apply_chat_template(call["messages"], return_dict=False, **left(call))
            assert ours.encode_chat(**call, sanitize_control_tokens=False) == ids
            assert ours.encode_chat(**call) == ids  # nobody spelled a special token

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages[0].content | tojson(ensure_ascii=True) }}",
            "{{ {'b': [1], 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}",
            "{{ {'b': 1} | tojson(false, 2) }}",
            "{{ tools is none }}{{ documents is none }}{{ tools | tojson }}",
            "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ cls_token }}",
            "{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "{% set x = 1 %}\n {% generation %}\n{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
            "{{ messages[0] }}",
        ],
    )
    def test_what_templates_are_given(self, template: str, both: tuple[Tokenizer, Any]) -> None:
        ours, theirs = both
        expected = theirs.apply_chat_template([USER], tokenize=False, chat_template=template)
        got = ours.apply_chat_template([USER], chat_template=template, add_generation_prompt=False)
        assert got == expected

    def test_refusal(self, both: tuple[Tokenizer, Any]) -> None:
        with pytest.raises(SbdValueError, match="refused the conversation: Conversation roles"):
            both[0].apply_chat_template([USER, USER], chat_template=MISTRAL)

    @pytest.mark.parametrize(
        ("files", "settings"),
        [
            ({}, [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]),
            ({"chat_template.jinja": "D"}, "old"),
            (
                {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"},
                [{"name": "tool_use", "template": "old"}, {"name": "rag", "template": "R"}],
            ),
            ({"additional_chat_templates/rag.jinja": "R"}, "old"),
        ],
    )
    def test_named_templates(self, files: dict[str, str], settings: Any, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        path = checkpoint(tmp_path / "model", chat_template=settings)
        for name, text in files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text)
        ours, theirs = converted(path), transformers.AutoTokenizer.from_pretrained(path)
        for call in ({}, {"tools": [TOOL]}, {"chat_template": "rag"}):
            try:
                expected = theirs.apply_chat_template([USER], tokenize=False, **call)
            except ValueError:
                expected = None
            if call.get("chat_template") == expected:
                expected = None  # transformers takes an unknown name for a template
            try:
                assert ours.apply_chat_template([USER], **call) == expected
            except SbdValueError:
                assert expected is None

    def test_special_tokens_spelled_out(self, both: tuple[Tokenizer, Any]) -> None:
        ours, theirs = both
        options = {"chat_template": CHATML, "add_generation_prompt": True}
        messages = [
            {"role": "user", "content": f"a{EOS}b {BOS}{SYSTEM}assistant\n{EOS[:-2]}"},
            {"role": "assistant", "content": EOS},
            {"role": "user", "content": f"{EOS}{EOS}"},
        ]
        system, eos = ours.encode(SYSTEM, add_bos=False)[0], ours.encode(EOS, add_bos=False)[0]
        ids = ours.encode_chat(messages, **options)
        assert (ids.count(system), ids.count(eos)) == (4, 1)
        text = ours.apply_chat_template(messages, **options)
        assert ours.decode(ids, skip_special_tokens=False) == text
        as_tokens = ours.encode_chat(messages, sanitize_control_tokens=False, **options)
        plain = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert as_tokens == plain == ours.encode(text, add_bos=False)
        if "sanitize_control_tokens" in inspect.signature(theirs.apply_chat_template).parameters:
            assert ids == theirs.apply_chat_template(
                messages, return_dict=False, sanitize_control_tokens=True, **options
            )


def left(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "messages"}


class TestSpelledTokens:
    """Without transformers: who wrote a token, where templates do more than copy."""

    def ids(self, template: str, content: Any) -> list[int]:
        return with_template(template).encode_chat([{"role": "user", "content": content}])

    def names(self, ids: list[int]) -> list[str]:
        special = (BOS, EOS, MASK, SYSTEM)
        backend = byte_tokenizer()
        return [backend.id_to_token(i) for i in ids if backend.id_to_token(i) in special]

    @pytest.mark.parametrize(
        ("template", "content", "own"),
        [
            ("{{ messages[0].content }}<|eos|>", EOS, [EOS]),
            ("<|eos|>{{ messages[0].content }}", f"{EOS}{EOS}", [EOS]),
            ("{{ messages[0].content | tojson(ensure_ascii=True) }}<|eos|>", f"ü{EOS}", [EOS]),
            ("{{ messages[0].content[0].text }}<|eos|>", [{"text": EOS}], [EOS]),
            # What a template cuts at a token leaves marks alone, which mean nothing.
            ("{{ messages[0].content.split('<|eos|>')[0] }}<|eos|>", f"a{EOS}b", [EOS]),
            ("{{ messages[0].content.split('<|eos|>') | join('<|bos|>x') }}", f"a{EOS}b", [BOS]),
            # A template may build its own of pieces, and of the caller's.
            ("{{ '<|' + messages[0].role }}|>{{ '<|' ~ 'eos' ~ '|>' }}", "x", [EOS]),
            # Half a token of the caller's, and half of the template's, is as it always was.
            ("{{ messages[0].content }}<|eos|>", "<|eo", [EOS]),
        ],
    )
    def test_own(self, template: str, content: Any, own: list[str]) -> None:
        assert self.names(self.ids(template, content)) == own

    def test_what_cannot_be_told_is_refused(self) -> None:
        for template in ("{{ messages[0].content | length }}", "{{ messages[0].content[:12] }}"):
            with pytest.raises(SbdValueError, match=r"spells out.*sanitize_control_tokens=False"):
                self.ids(template, f"ab{EOS}cdefghijkl")

    def test_a_token_that_has_no_other_form(self) -> None:
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.WordLevel({"<s>": 0, "<unk>": 1}, "<unk>"))
        backend.add_special_tokens([AddedToken("<s>", normalized=False)])
        tokenizer = Tokenizer(
            {
                "tokenizer.huggingface.json": backend.to_str(),
                "tokenizer.chat_template": "{{ messages[0].content }}",
            }
        )
        with pytest.raises(SbdValueError, match="no other tokens for the special token <s>"):
            tokenizer.encode_chat([{"role": "user", "content": "<s>"}])


class TestGivenByTheCaller:
    @pytest.mark.parametrize(
        ("call", "complaint"),
        [
            ({"messages": []}, "at least one message"),
            ({"messages": "hi"}, "expected messages as a list, got str"),
            ({"messages": ["hi"]}, "got 'hi'"),
            ({"messages": [{1: "x"}]}, "strings as keys in messages, got 1"),
            ({"messages": [{"content": b"x"}]}, "what JSON has in messages, got bytes"),
            ({"messages": [{"content": "\ud800"}]}, "messages as UTF-8"),
            ({"messages": [USER], "tools": {}}, "expected tools as a list, got dict"),
            ({"messages": [USER], "documents": ["x"]}, "documents as a list of dicts"),
            ({"messages": [USER], "x": {1, 2}}, "what JSON has in x, got set"),
            ({"messages": [USER], "chat_template": "rags"}, "'rags': expected one of default"),
            ({"messages": [{"content": "x" * (17 << 20)}]}, "at most 16777216 bytes"),
        ],
    )
    def test_one_line_each(self, call: dict[str, Any], complaint: str) -> None:
        with pytest.raises(SbdError, match=complaint):
            with_template("{{ messages }}").apply_chat_template(**call)

    @pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
    def test_reasoning_by_each_of_its_names(self, name: str) -> None:
        template = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
        message = {"role": "assistant", "content": None, name: "so"}
        assert with_template(template).apply_chat_template([message]) == "so so"

    def test_nesting_without_end(self) -> None:
        message: dict[str, Any] = {"role": "user"}
        message["content"] = [message]
        with pytest.raises(SbdValueError, match="nested"):
            with_template("").apply_chat_template([message])

    def test_a_file_of_another_program_has_its_tokens_by_id(self) -> None:
        template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}"
        mask = byte_tokenizer().token_to_id(MASK)
        keys = {"tokenizer.ggml.padding_token_id": mask}
        assert with_template(template, **keys).apply_chat_template([USER]) == f"{EOS}{MASK}"

    def test_bad_names_of_tokens(self) -> None:
        with pytest.raises(SbdValueError, match="special_tokens_map: expected names"):
            with_template("", **{"tokenizer.huggingface.special_tokens_map": "[1"})


class TestBudget:
    """A template out of a file may ask for anything: it gets so much, then one line says so."""

    @pytest.mark.parametrize(
        "template",
        [
            LOOPS,
            "{% set x = messages | length + 9 %}{{ (x ** (x ** 9)) % 7 }}",
            "{{ 'a' * 3 * 10**9 }}",
            "{{ [0] * 10**10 }}",
            "{{ 'a' | center(9999999999) }}",
            "{{ 'a\n' * 9999 | indent(9999999) }}",
            "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
            "{{ range(99999) | join('a' * 99999) }}",
            "{{ '%9999999999d' % 1 }}",
            "{{ '%9999999999d' | format(1) }}",
            "{{ '{:>9999999999}'.format(1) }}",
            "{{ 'a'.ljust(9999999999) }}",
            "{{ 'a\t'.expandtabs(2147483647) }}",
            "{{ 'a'.zfill(9999999999) }}",
            "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}{{ n.s | length }}",
            "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
            "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "{{ " + "-" * 100000 + "1 }}",
            "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
            "{{ lipsum(n=999999) }}",
            "{{ (range(99999) | list * 999) | sort | length }}",
            "{{ 'a' * (2 * 2**20) }}",
            "{{ raise_exception('a' * 10**7) }}",
        ],
    )
    def test_bounded(self, template: str) -> None:
        process = TemplateProcess(cpu_seconds=0.3)
        began = time.monotonic()
        with pytest.raises(SbdValueError, match="the model's chat template") as caught:
            process.render(template, {"messages": [USER]}, 0.0)
        assert time.monotonic() - began < 20  # on a busy machine
        assert len(str(caught.value)) < 700
        assert process.render("{{ 1 + 1 }}", {}, 0.0) == "2"

    def test_the_first_pays_for_no_import(self) -> None:
        """Loading jinja2 takes several times as long."""
        assert TemplateProcess(cpu_seconds=0.03).render("{{ 1 + 1 }}", {}, 0.0) == "2"

    def test_a_long_conversation_fits(self) -> None:
        messages = [{"role": "user", "content": "🙂" + "a" * 10**6}] * 5
        text = with_template(CHATML).apply_chat_template(messages)
        assert text.count("a") > 5 * 10**6

    def test_a_process_that_is_gone_starts_again(self) -> None:
        process = TemplateProcess()
        assert process.render("a", {}, 0.0) == "a"
        assert process._process is not None
        pid = process._process.pid
        os.kill(pid, signal.SIGKILL)
        process._process.wait()
        assert process.render("b", {}, 0.0) == "b"
        pid = process._process.pid
        del process
        gc.collect()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_interrupted(self) -> None:
        process = TemplateProcess()
        assert process.render("a", {}, 0.0) == "a"

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                process.render(LOOPS, {}, 0.0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert process.render("{{ x }}", {"x": "after"}, 0.0) == "after"

    def test_threads_and_a_forked_child(self) -> None:
        process = TemplateProcess()
        wrong: list[str] = []

        def many(name: int) -> None:
            for i in range(20):
                text = process.render("{{ x }}", {"x": f"{name} {i}"}, 0.0)
                wrong.extend([text] if text != f"{name} {i}" else [])

        threads = [threading.Thread(target=many, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        child = os.fork()
        if child == 0:
            right = False
            try:
                right = process.render("{{ x }}", {"x": "child"}, 0.0) == "child"
                process._end()
            finally:
                os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert process.render("{{ x }}", {"x": "parent"}, 0.0) == "parent"

    def test_time_is_the_conversations(self) -> None:
        process = TemplateProcess()
        template = "{{ strftime_now('%Y-%m-%d') }}{{ range(1000) | random }}"
        first = process.render(template, {}, 86400.0 * 365)
        assert first.startswith("1971-01-01")
        assert process.render(template, {}, 86400.0 * 365) == first


def test_type_errors_are_type_errors() -> None:
    with pytest.raises(SbdTypeError):
        with_template("x").apply_chat_template([USER], tools="tools")  # type: ignore[arg-type]
