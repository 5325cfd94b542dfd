"""What the options of a call come to: their defaults, which are in force, and those without
effect."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.command import PROMPT, check_error, run_here
from python.tiny_model import MASK, byte_tokenizer, write_tiny_model

import sbd_engine
from sbd_engine import Engine, Reveal, SbdError, SbdTypeError, SbdValueError, _core
from sbd_engine.cli.option_values import option_value
from sbd_engine.convert import convert
from sbd_engine.parameters import Options, parse
from sbd_engine.sizes import shown


def test_none_is_the_default_of_every_option(engine: Engine) -> None:
    nothing = dict.fromkeys(Options.__annotations__)
    assert parse({"prompt": "x", **nothing}) == parse({"prompt": "x"})
    done = engine.generate(PROMPT, **nothing)
    assert done.tokens == engine.generate(PROMPT).tokens
    with pytest.raises(SbdTypeError, match="prompt"):
        engine.generate(None)  # type: ignore[arg-type]


def test_numbers_beyond_all_floats() -> None:
    assert parse({"prompt": "x", "gamma": 10**400}).options == {"gamma": math.inf}
    for huge in (10**400, -(10**400)):
        with pytest.raises(SbdValueError, match="expected `temperature` >= 0 and finite"):
            parse({"prompt": "x", "temperature": huge})


def test_a_batch_has_options_for_all(engine: Engine) -> None:
    prompts = [PROMPT, {"prompt": "Another", "max_tokens": 3}]
    done = engine.generate_batch(prompts, max_tokens=7, ignore_eos=True, decoder="ntp")
    assert [len(each.tokens) for each in done] == [7, 3]
    assert [each.stats.nfe for each in done] == [7, 3]
    with pytest.raises(SbdTypeError, match="prompt 0 of the batch: unknown argument 'max_token'"):
        engine.generate_batch([PROMPT], max_token=7)  # type: ignore[call-arg]


def test_resolve(model: Path, engine: Engine, tmp_path: Path) -> None:
    assert engine.resolve() == {
        "decoder": "sbd",
        "block_size": 16,
        "unmask": "entropy_bounded",
        "gamma": 0.35,
        "proxy": "entropy",
        "max_tokens": 256,
        "ignore_eos": False,
        "temperature": 0.0,
        "stop": [],
    }
    sampled = engine.resolve(decoder="ntp", temperature=0.5, top_k=3, seed=7, stop="x")
    assert sampled == {
        "decoder": "ntp",
        "max_tokens": 256,
        "ignore_eos": False,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 7,
        "sample_index": 0,
        "stop": ["x"],
    }
    assert engine.resolve(top_n=3, block_size=8)["unmask"] == "top_n"
    steps = engine.resolve(steps=4)
    assert (steps["steps"], "top_n" in steps) == (4, False)
    with pytest.raises(SbdValueError, match="`block_size` from 1 to the context of 512"):
        engine.resolve(block_size=1000)
    # A number of positions that is asked for takes the place of the file's number of forwards.
    checkpoint = model.parent / "checkpoint"
    settings = ["decoders=sbd", "unmask=top_n", "steps=4"]
    convert(checkpoint, tmp_path / "steps.bin", type="f32", settings=settings)
    with Engine(tmp_path / "steps.bin") as other:
        assert other.resolve()["steps"] == 4
        assert other.resolve(top_n=2).get("steps", 0) is None
        done = other.generate(PROMPT, max_tokens=32, ignore_eos=True, top_n=2)
        assert done.stats.tokens_per_forward == 2


WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"decoder": "ntp", "gamma": 0.5}, '`gamma` has no effect with decoder "ntp": leave it out, or '
     "use `decoder` sbd, sbd_lossless"),
    ({"decoder": "ntp", "block_size": 8}, "`block_size` has no effect"),
    ({"horizon": 2}, '`horizon` has no effect with decoder "sbd": leave it out'),
    ({"skip_threshold": 0.5}, "`skip_threshold` has no effect"),
    ({"decoder": "sbd_lossless", "steps": 2}, "`steps` has no effect"),
    ({"factor": 1.0, "proxy": "margin"}, "`proxy` has no effect with unmask factor: leave it out, "
     "or use `unmask` entropy_bounded, top_n"),
    ({"unmask": "confidence", "gamma": 0.5}, "`gamma` has no effect with unmask confidence"),
    ({"gamma": 0.5, "top_n": 2}, "`top_n` has no effect with unmask entropy_bounded"),
    ({"steps": 2, "top_n": 2}, "`top_n` has no effect beside `steps`"),
    ({"top_k": 5}, "`top_k` has no effect at temperature 0"),
    ({"top_p": 0.5}, "`top_p` has no effect at temperature 0"),
    ({"min_p": 0.1}, "`min_p` has no effect at temperature 0"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "complaint"), WITHOUT_EFFECT)
def test_options_without_effect(
    asked: dict[str, Any],
    complaint: str,
    model: Path,
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused alike in Python and on the command line, there by the names of the flags."""
    with pytest.raises(SbdValueError) as caught:
        engine.generate(PROMPT, **asked)
    assert str(caught.value).startswith(complaint)
    flags = [part for k, v in asked.items() for part in (f"--{k.replace('_', '-')}", v)]
    done = run_here(capsys, "run", model, "-p", PROMPT, *flags)
    name = complaint.split("`")[1].replace("_", "-")
    check_error(done, f"error: --{name} has no effect")
    assert "`" not in done.stderr.decode()


def test_eval_refuses_them_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "x", "answer": "y"}')
    for flags in (["--decoder", "ntp", "--gamma", 0.5], ["--horizon", 2], ["--top-k", 5]):
        done = run_here(capsys, "eval", model, "--tasks", tasks, *flags)
        check_error(done, "has no effect")


def test_threads_of_a_gpu(model: Path) -> None:
    with pytest.raises(SbdValueError, match="`n_threads` has no effect with device cuda"):
        Engine(model, device="cuda", n_threads=2)


def test_numpy_prompts(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    expected = engine.generate(ids, max_tokens=9).tokens
    for dtype in (np.int32, np.uint16, np.int64):
        array = np.array(ids, dtype)
        assert engine.generate(array, max_tokens=9).tokens == expected
        assert engine.generate_batch([array], max_tokens=9)[0].tokens == expected
        assert np.array_equal(engine.forward(array), engine.forward(ids))
        assert engine.tokenizer.decode(array) == engine.tokenizer.decode(ids)
    for wrong in (np.array(ids, np.float32), np.array([ids, ids])):
        with pytest.raises(SbdTypeError, match="integer token ids"):
            engine.generate(wrong)


def test_repr(model: Path) -> None:
    engine = Engine(model)
    assert repr(engine) == (
        f"<Engine tiny.bin: qwen3 on {engine.device}, decoder sbd, n_ctx {engine.n_ctx}, "
        f"kv_budget {shown(engine.kv_budget)}, prefix_cache {shown(engine.prefix_cache)}>"
    )
    engine.close()
    assert repr(engine) == "<Engine tiny.bin, closed>"


def test_public_names() -> None:
    for name in sbd_engine.__all__:
        assert getattr(sbd_engine, name).__name__ == name
    errors = {name for name in vars(sbd_engine.errors) if name.startswith("Sbd")}
    assert errors <= {*sbd_engine.__all__}
    assert all(issubclass(getattr(sbd_engine, name), SbdError) for name in errors)
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = sbd_engine.Motor


class TestReveals:
    """Entropy and probability beside those of the raw logits."""

    @staticmethod
    def distribution(logits: Any, temperature: float = 1.0) -> Any:
        logits = logits.astype(np.float64) / temperature
        logits[byte_tokenizer().token_to_id(MASK)] = -np.inf
        shares = np.exp(logits - logits.max())
        return shares / shares.sum()

    def check(self, reveal: Reveal, logits: Any, temperature: float = 0.0) -> None:
        shares = self.distribution(logits)
        known = shares[shares > 0]
        assert reveal.entropy == pytest.approx(-(known * np.log(known)).sum(), rel=1e-3, abs=1e-5)
        drawn = self.distribution(logits, temperature or 1.0)
        assert reveal.probability == pytest.approx(drawn[reveal.token], rel=1e-3)

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    def test_next_tokens(self, engine: Engine, temperature: float) -> None:
        ids = engine.tokenizer.encode(PROMPT)
        sampling = {"temperature": temperature, "seed": 3}
        chunks = [*engine.stream(ids, max_tokens=6, decoder="ntp", ignore_eos=True, **sampling)]
        for position, chunk in enumerate(chunks):
            (reveal,) = chunk.revealed
            assert (reveal.position, [reveal.token]) == (position, chunk.tokens)
            self.check(reveal, engine.forward(ids)[-1], temperature)
            ids = [*ids, reveal.token]

    def test_a_block(self, engine: Engine) -> None:
        mask = byte_tokenizer().token_to_id(MASK)
        ids, block = engine.tokenizer.encode(PROMPT), [mask] * 8
        call = {"max_tokens": 8, "block_size": 8, "gamma": 0.5, "ignore_eos": True}
        for chunk in engine.stream(ids, decoder="sbd", **call):
            logits = engine.forward([*ids, *block], block=8)[len(ids) :]
            assert chunk.revealed
            for reveal in chunk.revealed:
                self.check(reveal, logits[reveal.position])
                block[reveal.position] = reveal.token
        assert mask not in block

    def test_every_decoder_tells(self, tmp_path: Path) -> None:
        write_tiny_model(tmp_path)
        settings = ["dmtd.layers=0,2,1", "decoders=sbd,d2f,nemotron_spec"]
        model = tmp_path / "all.bin"
        convert(tmp_path / "checkpoint", model, type="f32", block_size=4, settings=settings)
        with Engine(model) as engine:
            for decoder in ("sbd", "sbd_lossless", "dmtd", "d2f", "nemotron_spec"):
                chunks = [*engine.stream(PROMPT, max_tokens=12, decoder=decoder, ignore_eos=True)]
                reveals = [reveal for chunk in chunks for reveal in chunk.revealed]
                assert len(reveals) >= 12
                for reveal in reveals:
                    assert 0 < reveal.entropy <= math.log(272)
                    assert 0 < reveal.probability <= 1


def test_the_converter_takes_what_the_engine_takes() -> None:
    """Its list of keys stands apart, since it needs no engine."""
    from sbd_engine.convert.settings import OLDER_KEYS, SETTINGS

    for option in _core.OPTIONS:
        key = f"sbd.{option.key}"
        assert OLDER_KEYS.get(key, "") == (f"sbd.{option.older_key}" if option.older_key else "")
        parse = SETTINGS[key].parse
        assert [parse(name) for name in option.choices] == option.choices
        for value in NUMBERS[option.type]:
            try:
                taken = parse(str(value)) == value
            except ValueError:
                taken = False
            assert taken == option.holds(value), (key, value)


NUMBERS: dict[str, list[float]] = {
    "int": [-1, 0, 1, 1024, 1025, 65536, 65537, 2**31 - 1],
    "float": [-0.5, 0.0, 0.5, 1.0, 1.5, math.inf, math.nan],
    "str": [],
}


def test_the_page_is_the_table_s() -> None:
    maker = Path(__file__).parents[2] / "docs" / "options_page.py"
    page = runpy.run_path(str(maker))["page"]()
    assert maker.with_name("options.md").read_text() == page, "run: python docs/options_page.py"
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    no_flags = {"sample_index", "skip_special_tokens"}
    assert lines.keys() == Options.__annotations__.keys() - no_flags
    d2f = (
        "| `sbd.d2f.skip_threshold` | from 0 to 1 | `0.9` | Of d2f: the probability above which a "
    )
    assert lines["skip_threshold"] == f"| `skip_threshold` {d2f}token is decided. | `d2f` |"
    assert lines["top_p"].startswith("| `top_p` | `--top-p` | `1` |")


def test_a_line_of_the_table_is_enough_for_the_command_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Options` is for type checkers and editors: a flag that it lacks is not passed over."""
    monkeypatch.delitem(Options.__annotations__, "gamma")
    done = run_here(capsys, "run", model, "-p", PROMPT, "--decoder", "ntp", "--gamma", 0.5)
    check_error(done, "error: --gamma has no effect")
    assert option_value("gamma", "0.5") == 0.5
