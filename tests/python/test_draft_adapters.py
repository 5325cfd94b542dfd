"""Models beside a draft adapter: their text is next-token decoding's, their drafts are a float64
reference's, and files that are no adapter of the model are refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from python.command import call_here, check_refused, run
from reference.drafting import DraftingModel, RandomAdapter, write_gguf
from reference.lossless import sbd_lossless_decode
from reference.random_model import RandomModel, random_model, write_checkpoint

from sbd_engine import Engine
from sbd_engine.convert import convert
from sbd_engine.convert.fingerprint import fingerprint
from sbd_engine.errors import SbdValueError

from .decoded import check, check_next_tokens, untied
from .isas import ISAS
from .schemas import constraints

PROMPT = "Hello the world"
SAMPLED: dict[str, Any] = {"temperature": 0.7, "seed": 5, "top_k": 30}


def write_model(model: RandomModel, folder: Path, mask: bool) -> Path:
    """The model's file; without `mask` no token of its vocabulary is one."""
    config = dict(model.config)
    if not mask:
        del config["mask_token_id"]
    checkpoint = write_checkpoint(model, folder / "checkpoint")
    (checkpoint / "config.json").write_text(json.dumps(config))
    if not mask:
        settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
        del settings["mask_token"]
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(checkpoint, folder / "model.bin", type="f32", warn=lambda _: None)
    return folder / "model.bin"


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_the_references(seed: int, tmp_path: Path) -> None:
    model, mask = random_model(seed, steady=True), seed % 3 == 0
    mask_id = model.mask_id if mask else -1
    random_adapter = RandomAdapter(model, seed, mask_id=mask_id)
    reference = model.reference()
    drafting = DraftingModel(reference, random_adapter.adapter)
    random, accepted = np.random.default_rng(seed), []
    path = write_model(model, tmp_path, mask)
    adapter = random_adapter.write(tmp_path / "draft.gguf")
    with Engine(path, kv_dtype="f32", draft=adapter) as engine:
        assert engine.auto_decoder == "sbd_lossless"
        for gamma, block_size in (0.0, 4), (0.35, 16), (1.5, 7), (float("inf"), 8):
            n = int(random.integers(1, 60))
            options: dict[str, Any] = {
                "max_tokens": int(random.choice([5, 17, 30])),
                "ignore_eos": bool(random.integers(2)),
            }
            draw, (expected, lengths) = untied(
                lambda draw, n=n, options=options, gamma=gamma, block_size=block_size: (
                    sbd_lossless_decode(
                        drafting,
                        model.prompt(n, draw),
                        mask_id=mask_id,
                        eos_ids=model.eos_ids,
                        gamma=gamma,
                        block_size=block_size,
                        **options,
                    )
                )
            )
            prompt = model.prompt(n, draw)
            actual = engine.generate(prompt, gamma=gamma, block_size=block_size, **options)
            check(actual, expected, (n, draw, gamma, block_size, options))
            if lengths:
                assert actual.stats.accepted_length == pytest.approx(np.mean(lengths))
            barred = model.mask_id if mask else None
            ends = {"eos_ids": model.eos_ids, "mask_id": barred, **options}
            check_next_tokens(reference, prompt, actual, **ends)
            accepted += lengths
    assert seed > 0 or max(accepted) > 2


@pytest.fixture(scope="module")
def shape() -> RandomModel:
    """That of the tiny models: tests/python/tiny_model.py."""
    return random_model(7, "qwen3", rope="default", tied=True)


@pytest.fixture(scope="module")
def adapter(shape: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomAdapter(shape, 0).write(tmp_path_factory.mktemp("adapter") / "draft.gguf")


@pytest.fixture(scope="module")
def drafting(plain_model: Path, adapter: Path) -> Iterator[Engine]:
    with Engine(plain_model, draft=adapter) as engine:
        yield engine


def texts(engine: Engine, **options: Any) -> list[list[int]]:
    prompts = [PROMPT, "ing the\n", "a", "the " * 40]
    return [engine.generate(p, max_tokens=40, ignore_eos=True, **options).tokens for p in prompts]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_next_token_decodings(
    isa: str,
    sampling: dict[str, Any],
    plain_model: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBD_ISA", isa)
    try:
        plain = Engine(plain_model)
    except SbdValueError as error:
        assert "does not support" in str(error)
        pytest.skip(str(error))
    with plain, Engine(plain_model, draft=adapter) as engine:
        expected = texts(plain, **sampling)
        assert texts(engine, decoder="ntp", **sampling) == expected
        assert texts(engine, **sampling) == expected
        assert texts(engine, block_size=8, **sampling) == expected
        assert texts(engine, block_size=8, unmask="top_n", top_n=8, **sampling) == expected


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_in_batches_and_streams(drafting: Engine, sampling: dict[str, Any]) -> None:
    common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, **sampling}
    prompts = [PROMPT, "ing the\n", "a", "the " * 40, PROMPT, "b"]
    expected = [drafting.generate(p, decoder="ntp", **common).tokens for p in prompts]
    asked = [
        {"prompt": p, **([{"block_size": 6}, {"decoder": "ntp"}, {}][i % 3])}
        for i, p in enumerate(prompts)
    ]
    batch = drafting.generate_batch(asked, **common)
    assert [done.tokens for done in batch] == expected
    assert batch[0].stats.drafts is not None and batch[0].stats.drafts.guesses > 0
    with drafting.stream(PROMPT, block_size=6, **common) as stream:
        assert [token for chunk in stream for token in chunk.tokens] == expected[0]

    async def streamed() -> list[int]:
        stream = drafting.astream(PROMPT, block_size=6, **common)
        return [token async for chunk in stream for token in chunk.tokens]

    assert asyncio.run(streamed()) == expected[0]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_under_constraints(drafting: Engine, temperature: float) -> None:
    """Drafts are the adapter's, what is allowed is the verifying rows' to say."""
    pytest.importorskip("llguidance")
    guesses = 0
    for seed, constraint in enumerate(constraints(20)):
        call = {"max_tokens": 40, "temperature": temperature, "seed": seed, **constraint}
        ntp = drafting.generate(PROMPT, decoder="ntp", **call)
        done = drafting.generate(PROMPT, block_size=6, **call)
        assert (done.tokens, done.finish_reason) == (ntp.tokens, ntp.finish_reason), constraint
        guesses += done.stats.drafts.guesses if done.stats.drafts else 0
    assert guesses > 50


def test_a_mask_token_in_a_prompt_is_a_token(model: Path, adapter: Path) -> None:
    """The adapter's mask is that of its own rows alone."""
    with Engine(model) as plain, Engine(model, draft=adapter) as engine:
        mask = engine.model_config["mask_token_id"]
        prompt = [1, mask, 40, mask]
        options: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
        expected = plain.generate(prompt, decoder="ntp", **options).tokens
        assert engine.auto_decoder == "sbd_lossless"
        assert engine.generate(prompt, block_size=8, **options).tokens == expected
        other = plain.generate(prompt, decoder="sbd_lossless", block_size=8, **options)
        assert other.tokens == expected


def test_a_plain_model_drafts_from_the_command_line(plain_model: Path, adapter: Path) -> None:
    common = ["run", plain_model, "-p", PROMPT, "-n", 30, "--ignore-eos", "--json"]
    plain = json.loads(run(*common).stdout)
    assert plain["decoder"] == "ntp" and plain["stats"]["drafts"] is None
    for flag in "--draft", "--draft-lora":
        done = run(*common, flag, adapter, "--block-size", 8)
        assert done.stderr == b""
        drafted = json.loads(done.stdout)
        assert drafted["tokens"] == plain["tokens"]
        assert drafted["decoder"] == "sbd_lossless"
        assert drafted["stats"]["drafts"]["guesses"] > 0


def test_what_the_file_says_of_drafts(
    shape: RandomModel, plain_model: Path, model: Path, tmp_path: Path
) -> None:
    acceptance = [1.0, 0.9, 0.5]
    made = RandomAdapter(shape, 0).write(
        tmp_path / "draft.gguf", block_size=6, **{"draft.acceptance": acceptance}
    )
    with Engine(plain_model, draft=made) as engine:
        assert engine.defaults["block_size"] == 6
        assert engine.defaults["decoders"] == ["sbd_lossless", "ntp"]
        assert engine.decoders == ["ntp", "sbd_lossless", "nemotron_spec"]
    with Engine(plain_model, draft=made, n_ctx=4) as engine:
        assert engine.defaults["block_size"] == 4
    with Engine(model, draft=made) as engine:
        assert engine.defaults["decoders"] == ["sbd_lossless", "sbd", "ntp"]


def test_fingerprints(
    shape: RandomModel, plain_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another model's is told, once, and no error; its types do not matter."""
    own = fingerprint(GGUFReader(plain_model))
    made = RandomAdapter(shape, 0)
    right = made.write(tmp_path / "right.gguf", **{"draft.fingerprint": own})
    wrong = made.write(tmp_path / "wrong.gguf", **{"draft.fingerprint": "0" * 64})
    convert(
        plain_model.parent / "checkpoint", tmp_path / "f16.bin", type="f16", warn=lambda _: None
    )
    for model in plain_model, tmp_path / "f16.bin":
        Engine(model, draft=right).close()
    assert capfd.readouterr().err == ""
    Engine(plain_model, draft=wrong).close()
    told = capfd.readouterr().err
    assert told.startswith(f"note: {wrong}: trained beside another model than {plain_model}")
    assert told.count("\n") == 1 and own[:12] in told


def test_inspect(
    shape: RandomModel, plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = RandomAdapter(shape, 0)
    path = made.write(tmp_path / "draft.gguf", block_size=8, **{"draft.acceptance": [1.0, 0.75]})
    code, out, _ = call_here(capsys, "inspect", path, "--json")
    values = json.loads(out)
    assert code == 0 and values["problem"] is None
    assert values["adapter"]["mask_embedding"] is True
    assert values["adapter"]["alpha"] == pytest.approx(made.alpha)
    assert len(values["adapter"]["matrices"]) == 7
    assert values["adapter"]["layers"] == shape.config["num_hidden_layers"]
    assert values["sbd"] == {"sbd.block_size": 8, "sbd.draft.acceptance": [1.0, 0.75]}
    code, out, _ = call_here(capsys, "inspect", path)
    assert code == 0 and "MODEL --draft draft.gguf" in out and "acceptance" in out
    code, out, _ = call_here(capsys, "inspect", plain_model, "--json")
    assert json.loads(out)["fingerprint"] == fingerprint(GGUFReader(plain_model))
    assert json.loads(out)["adapter"] is None


def test_bench_times_both(
    plain_model: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bench", plain_model, "--rows", "1,4", "--context", "8", "--repeats", "1"]
    code, out, _ = call_here(capsys, *line, "--draft", adapter, "--json")
    assert code == 0
    for result in json.loads(out)["results"]:
        assert result["draft_ms_per_forward"] > 0 and result["ms_per_forward"] > 0
    code, out, _ = call_here(capsys, *line, "--draft", adapter)
    assert code == 0 and "draft ms" in out
    code, out, _ = call_here(capsys, *line, "--json")
    assert json.loads(out)["results"][0]["draft_ms_per_forward"] is None


FIRST = "blk.0.attn_q.weight.lora_a"


def damaged(made: RandomAdapter, how: str) -> None:
    tensors = made.tensors
    if how == "shapes":
        tensors[FIRST] = np.concatenate([tensors[FIRST], tensors[FIRST]], axis=1)
    elif how == "other shapes":
        name = "blk.1.ffn_down.weight.lora_b"
        tensors[name] = tensors[name][:-1]
    elif how == "pairs":
        del tensors["blk.1.attn_k.weight.lora_b"]
    elif how == "other pairs":
        del tensors["blk.1.ffn_up.weight.lora_a"]
    elif how == "rank":
        rank = max(tensors[FIRST].shape[1], 300)
        tensors[FIRST] = np.ones((rank, tensors[FIRST].shape[1]), np.float32)
        name = FIRST.replace("lora_a", "lora_b")
        tensors[name] = np.ones((tensors[name].shape[0], rank), np.float32)
    elif how == "nan":
        tensors[FIRST][0, 0] = np.nan
    elif how == "mask nan":
        tensors["sbd.draft.mask_embedding"][3] = np.inf
    elif how == "mask shape":
        tensors["sbd.draft.mask_embedding"] = np.ones(3, np.float32)
    elif how == "unknown":
        tensors["blk.0.attn_norm.weight.lora_a"] = np.ones((2, 2), np.float32)
    elif how == "no mask":
        del tensors["sbd.draft.mask_embedding"]


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("shapes", f"tensor {FIRST}: expected shape [rank, "),
        ("other shapes", "tensor blk.1.ffn_down.weight.lora_b: expected shape ["),
        ("pairs", "tensor blk.1.attn_k.weight.lora_b is missing: expected it beside blk.1.attn_k."),
        ("other pairs", "tensor blk.1.ffn_up.weight.lora_a is missing: expected it beside blk.1."),
        ("rank", f"tensor {FIRST}: expected shape [rank, "),
        ("nan", f"tensor {FIRST}: row 0 holds NaN or infinity"),
        ("mask nan", "tensor sbd.draft.mask_embedding holds NaN or infinity"),
        ("mask shape", "tensor sbd.draft.mask_embedding: expected shape ["),
        ("unknown", "tensor 'blk.0.attn_norm.weight.lora_a' is none of an adapter's"),
        ("no mask", 'no decoder of this model can draft with it: decoder "sbd_lossless" needs a '),
    ],
)
def test_files_that_are_refused(
    how: str,
    complaint: str,
    shape: RandomModel,
    plain_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = RandomAdapter(shape, 0)
    damaged(made, how)
    path = made.write(tmp_path / "draft.gguf")
    done = call_here(capsys, "run", plain_model, "-p", "x", "--draft", path)
    check_refused(done, complaint)
    assert str(path) in done[2] or how in ("nan", "mask nan")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "llama"}, "of architecture 'llama', expected the model's, 'qwen3'"),
        ({"alpha": float("inf")}, "key 'adapter.lora.alpha' is inf, expected a finite number"),
        ({"alpha": None}, "adapter.lora.alpha"),
        ({"block_size": 0}, "key 'sbd.block_size' is 0, expected 1 to 512"),
        ({"draft.acceptance": [0.5] * 17}, "has 17 numbers, expected at most 16"),
        ({"draft.acceptance": [0.5, 1.5]}, "has 1.5, expected numbers from 0 to 1"),
    ],
)
def test_keys_that_are_refused(
    changes: dict[str, Any],
    complaint: str,
    shape: RandomModel,
    plain_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = RandomAdapter(shape, 0).write(tmp_path / "draft.gguf", **changes)
    check_refused(call_here(capsys, "run", plain_model, "-p", "x", "--draft", path), complaint)


def test_what_cannot_draft(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for decoder in "ntp", "sbd":
        for command in ["run", model, "-p", "x"], ["eval", model], ["chat", model]:
            done = call_here(capsys, *command, "--draft", adapter, "--decoder", decoder)
            check_refused(done, f'--draft has no effect with decoder "{decoder}", which does not')
    done = call_here(capsys, "run", model, "-p", "x", "--draft", model)
    check_refused(done, "expected an adapter, whose key 'general.type' is 'adapter'")
    done = call_here(capsys, "run", adapter, "-p", "x")
    check_refused(done, "an adapter, expected a model: give it as --draft beside its model")
    empty = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
    path = write_gguf(tmp_path / "none.gguf", {"general.architecture": "qwen3", **empty}, {})
    done = call_here(capsys, "run", model, "-p", "x", "--draft", path)
    check_refused(done, "an adapter without tensors")


def test_a_server_drafts(plain_model: Path, adapter: Path) -> None:
    pytest.importorskip("fastapi")
    from .test_cli_serve import ask, serving

    with Engine(plain_model) as engine:
        expected = engine.generate(PROMPT, max_tokens=20, ignore_eos=True).text
    with serving(plain_model, "--draft", adapter, "--alias", "tiny") as (_, url, _):
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        answer = ask(f"{url}/v1/completions", {**body, "block_size": 8})
    assert answer["choices"][0]["text"] == expected
