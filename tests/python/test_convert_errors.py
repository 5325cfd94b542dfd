"""Bad input has its line and exit code 2, and a file appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbd_engine.convert.hf_to_sbd import main

from .checkpoints import SHAPE, VOCAB_SIZE, Array, convert_quietly, edit_json, refusal

SCRIPT = Path(__file__).resolve().parents[2] / "convert" / "hf_to_sbd.py"

# Bad input


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def _tensors(change: Callable[[dict[str, Array]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _bad_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")


def _lone_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00003.safetensors")


def _shard_of_many(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-3-of-99999999999.safetensors")


def _link_out(name: str) -> Callable[[Path], None]:
    """Makes a file of the folder a link to one outside of it."""

    def apply(folder: Path) -> None:
        (folder / "chat_template.jinja").touch()
        (folder / name).rename(folder / "../outside")
        (folder / name).symlink_to("../outside")

    return apply


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _index(**weight_map: str) -> Callable[[Path], None]:
    content = json.dumps({"weight_map": weight_map}).encode()
    return _write("model.safetensors.index.json", content)


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
BAD_CHECKPOINTS: list[tuple[Callable[[Path], None], str]] = [
    (_remove("config.json"), "no config.json"),
    (_write("config.json", b"{"), "not JSON"),
    (_write("config.json", b"[]"), "expected a JSON object, got list"),
    (_write("config.json", b"\xff"), "not JSON"),
    (_remove("model.safetensors"), "no .safetensors file"),
    (_pickle_only, "weights only as pickles (pytorch_model.bin): expected .safetensors"),
    (_lone_shard, "missing 2 of 3 weight files: model-00001-of-00003.safetensors, model-00003"),
    (_shard_of_many, "missing 99999999998 of 99999999999 weight files: model-1-of-99999999999.saf"),
    (_shard_of_many, ", model-5-of-99999999999.safetensors and 99999999994 more"),
    (_fifo, "no .safetensors file"),
    (_link_out("chat_template.jinja"), "'chat_template.jinja' leads out of the folder, to "),
    (_link_out("model.safetensors"), "'model.safetensors' leads out of the folder, to "),
    (_link_out("config.json"), "'config.json' leads out of the folder, to "),
    (_index(a="../model.safetensors"), "'../model.safetensors' leads out of the folder, to "),
    (_index(a="/etc/passwd"), "'/etc/passwd' leads out of the folder, to /etc/passwd"),
    (_index(a="x\0y"), "not to be found: embedded null byte"),
    (_write("config.json", b'{"a": ' * 100_000), "not JSON: "),
    (_write("config.json", b"1" * 5000), "not JSON: "),
    (_config(num_hidden_layers=2**31 - 1), "num_hidden_layers: expected at most 4096, got 2147"),
    (_config(vocab_size=2**31 - 1), "vocab_size: expected at most 4194304, got 2147483647"),
    (_config(max_position_embeddings=1), "max_position_embeddings: expected at least 2, got 1"),
    (_config(hidden_size=10**400), "hidden_size: expected a positive integer, got 1000"),
    (_index(a="gone.safetensors"), "missing 1 of 1 weight files: gone.safetensors"),
    (_index(a="model.safetensors"), "names tensors that no file has: a"),
    (_index(), "no weight_map"),
    (_truncate, "not a whole safetensors file"),
    (_config(model_type="gpt2"), "'gpt2' is not supported: expected one of llama, mistral, "),
    (_config(model_type=None), "model_type None is not supported"),
    (_config(quantization_config={"quant_method": "gptq"}), "already quantised (gptq)"),
    (_config(hidden_act="gelu"), "hidden_act: expected 'silu', got 'gelu'"),
    (_config(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1.0, got 0.5"),
    (_config(hidden_size=0), "hidden_size: expected a positive integer, got 0"),
    (_config(num_hidden_layers="2"), "num_hidden_layers: expected a positive integer, got '2'"),
    (_config(rms_norm_eps=-1), "rms_norm_eps: expected a number from 1e-12 to 0.999, got -1"),
    (_config(head_dim=31), "head_dim: expected an even number, got 31"),
    (_config(num_key_value_heads=3), "4 is not a multiple of num_key_value_heads 3"),
    (_config(rope_parameters={"rope_type": "ntk"}), "'ntk' is not supported: expected one of"),
    (_config(rope_scaling={"type": "longrope", "factor": 4}), "RoPE type 'longrope' is not supp"),
    (_config(rope_parameters={"rope_type": "linear"}), "factor: expected a positive number"),
    (
        _config(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "rope_parameters: 'full_attention': expected one object for all layers, got one for each",
    ),
    (_config(rope_scaling={"type": "linear", "alpha": 2}), "rope_scaling: unknown key 'alpha'"),
    (
        _config(
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rope_scaling={"type": "linear", "factor": 2.0},
        ),
        "rope_theta: 1000000.0 in rope_parameters, whose place rope_scaling takes: expected it in",
    ),
    (_config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor: expected 1"),
    (_config(rope_parameters={"llama_4_scaling_beta": 0.1}), "expected none in a llama model, got"),
    (_config(rope_parameters={"rope_theta": 10**400}), "rope_theta: expected a number from 1 to"),
    (_config(rope_parameters={"rope_theta": 1e308}), "a number from 1 to 3.40282e+38, got 1e+308"),
    (_config(num_hidden_layers=3), "9 tensors of a llama model are missing: model.layers.2."),
    (_config(num_hidden_layers=1), "9 tensors are none of a llama model: model.layers.1."),
    (_config(intermediate_size=64), "6 tensors have not the shape that config.json says"),
    (_config(intermediate_size=64), "gate_proj.weight: expected [64, 64], got [96, 64]"),
    (_config(eos_token_id=320, mask_token_id=1), "eos_token_id: expected an id from 0 to 319"),
    (_config(mask_token_id=320), "mask_token_id: expected an id from 0 to 319, got 320"),
    (_config(mask_token_id="<m>"), "mask_token_id: expected an id from 0 to 319, got '<m>'"),
    (_config(rope_scaling="yarn"), "rope_scaling: expected an object, got 'yarn'"),
    (_config(mask_token_id=302), "mask token: id 302 is an EOS token too"),
    (_config(block_size=0), "config.json: block_size: expected an integer from 1"),
    (_config(block_size=513), "block size: expected at most the context 512, got 513"),
    (_tensors(lambda t: t.pop(NORM)), f"1 tensors of a llama model are missing: {NORM}"),
    (_tensors(lambda t: t.update(odd=t[NORM])), "1 tensors are none of a llama model: odd"),
    (_tensors(lambda t: t[DOWN].__setitem__((3, 7), np.nan)), f"{DOWN} holds NaN or infinity"),
    (_tensors(lambda t: t[NORM].__setitem__(0, -np.inf)), f"{NORM} holds NaN or infinity"),
    (_tensors(lambda t: t[DOWN].__setitem__((0, 0), 1e7)), "1e+07 does not fit Q8_0"),
    (_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), "is of type I8: expected one"),
    (_remove("tokenizer.json"), "no tokenizer: expected tokenizer.json, a sentencepiece"),
    (_bad_sentencepiece, "tokenizer.model: not a sentencepiece model"),
    (_write("tokenizer.json", b"{}"), "tokenizer.json: "),
    (_write("tokenizer.json", b"\xff"), "tokenizer.json: not UTF-8"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_CHECKPOINTS)
def test_bad_checkpoint(
    damage: Callable[[Path], None], message: str, llama_copy: Path, tmp_path: Path
) -> None:
    damage(llama_copy)
    if message.startswith("eos_token_id"):
        (llama_copy / "generation_config.json").unlink()
    out = tmp_path / "out"
    out.mkdir()
    assert message in refusal(llama_copy, out / "model.bin")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--type", "q5_k"],
            "--type: expected one of f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, "
            "q4_0, got 'q5_k'",
        ),
        (["--mask-token", "<|msk|>"], "has no token '<|msk|>'; did you mean <|mask|>"),
        (["--mask-token", "320"], "mask token: expected an id from 0 to 319, got 320"),
        (["--mask-token", "301"], "mask token: id 301 is an EOS token too"),
        (["--block-size", "0"], "--block-size: expected an integer from 1 to 1024, got '0'"),
        (["--block-size", "513"], "block size: expected at most the context 512, got 513"),
        (["--gamma", "-0.1"], "--gamma: expected a number from 0 to inf, got '-0.1'"),
        (["--gamma", "nan"], "--gamma: expected a number from 0 to inf, got 'nan'"),
        (["--set", "gama=1"], "--set: unknown key 'gama': expected one of sbd.mask_token_id,"),
        (["--set", "gamma"], "--set: expected KEY=VALUE, got 'gamma'"),
        (["--set", "unmask=all"], "--set unmask: expected one of entropy_bounded, factor"),
        (["--set", "decoders=sbd,sbd"], "--set decoders: expected some of ntp,sbd"),
        (["--set", "logit_shift=2"], "--set logit_shift: expected 0 or 1, got '2'"),
        (["--set", "factor=0"], "--set factor: expected a number above 0, got '0'"),
        (["--set", "dmtd.layers=1,1"], "--set dmtd.layers: expected 3 integers from 0"),
        (["--set", "dmtd.layers=1,1,1"], "layers with a sum of 2, at least one in"),
        (["--set", "eos_token_ids=1,320"], "sbd.eos_token_ids: expected an id from 0 to 319"),
        (["--lora", "nowhere"], "LoRA adapter: nowhere/adapter_config.json is missing"),
        (["--no-such-option"], "No such option"),
        (["--block-size", "x"], "--block-size"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run_main(
        [str(llama), "-o", str(tmp_path / "model.bin"), *arguments], monkeypatch, capsys
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def run_main(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["hf_to_sbd.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


def test_sbd_needs_a_mask_token(llama_copy: Path, tmp_path: Path) -> None:
    edit_json(llama_copy / "tokenizer_config.json", mask_token=None)
    out = tmp_path / "model.bin"
    assert "sbd.block_size needs a mask token" in refusal(llama_copy, out, block_size=4)
    assert "sbd.gamma needs a mask token" in refusal(llama_copy, out, gamma=0.1)
    assert "sbd.gamma needs a mask token" in refusal(llama_copy, out, settings=["gamma=0.1"])
    settings = ["decoders=sbd"]
    assert "decoders: sbd needs a mask token" in refusal(llama_copy, out, settings=settings)


def test_bad_paths(llama: Path, llama_copy: Path, tmp_path: Path) -> None:
    weights, out = llama_copy / "model.safetensors", tmp_path / "model.bin"
    before = weights.read_bytes()
    assert "no such file or folder" in refusal(tmp_path / "nowhere", out)
    assert "expected one checkpoint folder" in refusal([llama, llama_copy], out)
    assert "expected one checkpoint folder" in refusal(llama_copy / "config.json", out)
    assert "is a folder" in refusal(llama, tmp_path)
    assert "no such folder" in refusal(llama, tmp_path / "nowhere" / "model.bin")
    assert "is a file of the checkpoint itself" in refusal(llama_copy, weights)
    assert weights.read_bytes() == before
    twice = llama_copy / "again.safetensors"
    shutil.copy(weights, twice)
    assert "is in both" in refusal([weights, twice], out)


# The file appears whole or not at all


def test_failure_in_the_middle_leaves_the_old_file(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.bin"
    out.write_bytes(b"old")
    written: list[int] = []

    def interrupt(n: int) -> None:
        written.append(n)
        if len(written) == 5:
            assert len(list(tmp_path.iterdir())) == 2  # there is something to clean up
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_quietly(llama, out, on_bytes=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]
    assert out.read_bytes() == b"old"


def test_what_must_not_be_replaced(llama_copy: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for output, says in (
        (tmp_path / "fifo", "is no regular file"),
        (Path("/dev/null"), "is no regular file"),
        (llama_copy / "model.safetensors", "is a file of the checkpoint itself"),
        (llama_copy / "tokenizer.json", "is a file of the checkpoint itself"),
    ):
        before = output.stat().st_ino
        assert says in refusal(llama_copy, output)
        assert output.stat().st_ino == before
    for _ in range(2):  # a model file beside the weights is made anew
        convert_quietly(llama_copy, llama_copy / "model.bin")


def test_links_into_the_hub_cache_are_its_own(llama: Path, tmp_path: Path) -> None:
    """models--a--b/snapshots/REVISION/NAME is a link to ../../blobs/HASH; and who names a file
    means it, link or not."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(llama.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    convert_quietly(snapshot, tmp_path / "model.bin")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(llama / "model.safetensors")
    assert "leads out of the folder" in refusal(snapshot, tmp_path / "again.bin")
    convert_quietly(snapshot / "model.safetensors", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_no_escape_sequence_of_a_file_reaches_the_terminal(
    llama_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "\x1b]0;mine\x07\u202e\x9b\ndone"
    damages = (
        _tensors(lambda t: t.update({evil: t[NORM]})),
        _index(**{evil: "model.safetensors"}),
        _index(a=evil),
        _config(quantization_config={"quant_method": evil}),
        _config(rope_scaling={evil: 1}),
    )
    config = (llama_copy / "config.json").read_text()
    weights = (llama_copy / "model.safetensors").read_bytes()
    for damage in damages:
        (llama_copy / "model.safetensors.index.json").unlink(missing_ok=True)
        (llama_copy / "config.json").write_text(config)
        (llama_copy / "model.safetensors").write_bytes(weights)
        damage(llama_copy)
        arguments = [str(llama_copy), "-o", str(tmp_path / "m.bin")]
        code, out, err = run_main(arguments, monkeypatch, capsys)
        assert (code, out) == (2, "")
        assert err.isprintable() or err.rstrip("\n").isprintable()
        assert "x1b]0;mine" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_it_leave_nothing(name: str, llama: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parents[1])!r})\n"
        "from convert import conversion, hf_to_sbd\n"
        "def encode(*_):\n"
        f"    parts = os.listdir({str(tmp_path)!r})\n"
        "    assert len(parts) == 1 and parts[0].endswith('.part')\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "conversion.encode = encode\n"
        f"sys.argv = ['x', {str(llama)!r}, '-o', {str(tmp_path / 'model.bin')!r}]\n"
        "hf_to_sbd.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert done.stderr == "interrupted: nothing written\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_exit_code_130(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sbd_engine.convert.conversion.encode", interrupted)
    code, out, err = run_main([str(llama), "-o", str(tmp_path / "m.bin")], monkeypatch, capsys)
    assert (code, out, err) == (130, "", "interrupted: nothing written\n")
    assert list(tmp_path.iterdir()) == []


def test_full_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's limit on a file's size fails a write just as a full disk does."""
    out = tmp_path / "model.bin"
    program = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['hf_to_sbd.py', {str(llama)!r}, '-o', {str(out)!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: File too large\n"
    assert list(tmp_path.iterdir()) == []

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "the disk has 1,000 bytes free, " in refusal(llama, out)


def test_permissions_are_the_usual_ones(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the process's umask, which would change it for a moment."""
    monkeypatch.setattr(os, "umask", None)
    convert_quietly(llama, tmp_path / "model.bin")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


# As a program


def test_script_from_another_folder(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(llama), "-o", "model.bin", "--block-size", "8"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "model.bin: 21 tensors, q8_0, 0.2 MB, decoders: sbd_lossless, sbd, ntp\n"
    convert_quietly(llama, tmp_path / "same.bin", block_size=8)
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "same.bin").read_bytes()


def test_warnings_are_lines_on_standard_error(
    llama_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = [f"<{i}>" for i in range(VOCAB_SIZE - 303)]  # one more than there are rows
    edit_json(llama_copy / "tokenizer_config.json", mask_token=None, extra_special_tokens=tokens)
    code, out, err = run_main([str(llama_copy), "-o", str(tmp_path / "m.bin")], monkeypatch, capsys)
    assert code == 0 and out.endswith("decoders: ntp\n")
    assert err == (
        "warning: the model's vocabulary of 320 has no place for 1 of the tokens that the "
        "tokenizer's configuration names: <16>\n"
    )


def test_memory_stays_small(tmp_path: Path) -> None:
    """A model of one 200 MB embedding, most of it never in memory at once."""
    from safetensors.numpy import save_file

    vocab, hidden = 24576, 2048
    config = (
        SHAPE
        | {"model_type": "llama"}
        | {"vocab_size": vocab, "hidden_size": hidden, "tie_word_embeddings": True}
    )
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    word_level = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": word_level}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    from sbd_engine.convert.architectures import tensor_specs

    specs = tensor_specs(config, tied=True)
    tensors = {spec.source: np.full(spec.shape, 0.5, np.float32) for spec in specs}
    save_file(tensors, folder / "model.safetensors")
    del tensors
    program = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parents[1])!r})\n"
        "from pathlib import Path\n"
        "from convert import convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        f"convert(Path({str(folder)!r}), Path({str(tmp_path / 'm.bin')!r}), warn=str)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 80e6 < (folder / "model.safetensors").stat().st_size / 2
