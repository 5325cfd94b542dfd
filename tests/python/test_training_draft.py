"""`python -m training.draft`: answers, an adapter, a file that others can read; and bad input."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from reference.model import causal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from sbd_engine import Engine  # noqa: E402
from training import command, draft, draft_prompts  # noqa: E402
from training.draft_objective import MASK_EMBEDDING, MASKED, Masking, double  # noqa: E402
from training.examples import Example  # noqa: E402
from training.model_file import load_model, open_model_file  # noqa: E402
from training.trainer import Recipe  # noqa: E402

from .checkpoints import (  # noqa: E402
    LINEAR_ROPE,
    LLAMA3_ROPE,
    YARN_ROPE,
    convert_quietly,
    read_model,
    state_of,
    write_checkpoint,
)
from .family_models import (  # noqa: E402
    NEMOTRON,
    family_logits,
    random_tensors,
    visible,
    write_family,
)
from .test_foreign_types import CONFIG, MIXES, reference_of, write_model  # noqa: E402
from .test_training_draft_objective import adapted  # noqa: E402

OPTIONS = ["--rank", "4", "--block-size", "4", "--length", "48", "--max-tokens", "24"]
OPTIONS += ["--batch-size", "4", "--micro-batch-size", "2", "--save-every", "2"]
OPTIONS += ["--warmup-steps", "50", "--learning-rate", "1e-2", "--no-bfloat16"]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def train(*arguments: object) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as exit:
        draft.main([*map(str, arguments)])
    return int(exit.value.code or 0)


def run_of(adapter: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((adapter.with_suffix(".run") / "training.json").read_text())
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in a model file, its norms and RoPE permuted as such are; without a mask token."""
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model", "llama", mask_token=None)
    convert_quietly(folder / "model", folder / "model.gguf", type="f32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    kinds = ("count", "spell", "new")
    lines = [{"prompt": f"{kinds[i % 3]} {i}:", "family": kinds[i % 3]} for i in range(48)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def answers(base: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    from training.answers import make_answers

    common = ["--max-tokens", "24"]
    ways = {"greedy": common, "sampled": [*common, "--temperature", "0.7"]}
    make_answers(base, prompts, folder, ways)
    return folder


def test_from_a_checkpoint_to_an_adapter(
    prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command alone: a fresh checkpoint's own answers, and a file whose matrices, merged as
    the file has them, are the model that was trained."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama", mask_token=None)
    out = tmp_path / "adapter.gguf"
    call = ["--model", checkpoint, "--prompts", prompts, "--out", out, *OPTIONS]
    assert train(*call, "--held-out", "new", "--steps", "6", "--alpha", "6") == 0
    printed, said = capfd.readouterr()
    assert f"{out}: of step " in printed and "tokens behind a known one (" in printed
    assert "GiB of memory" in said and "minutes for 6 steps of 4 answers" in said
    folder = tmp_path / "adapter.run"
    (model_file,) = folder.glob("model-*.gguf")
    for way, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        lines = (folder / "answers" / f"prompts.{way}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines[1:]]
        assert len(found) == 48
        assert {line["options"]["temperature"] for line in found} == {temperature}
    run = run_of(out)
    assert [point["step"] for point in run["held_out"]] == [2, 4, 6]
    # One kind whole, and of the 32 prompts of the two others two.
    assert "new" in (kinds := set(run["held_out"][0]["by_kind"])) and 2 <= len(kinds) <= 3
    assert run["tokens"] == run["loss"][-1]["tokens"] > 6 * 4 * 10

    metadata, tensors = read_model(out)
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == "llama"
    assert metadata["adapter.lora.alpha"] == 6.0 and metadata["sbd.block_size"] == 4
    assert metadata["sbd.draft.fingerprint"] == open_model_file(model_file).fingerprint
    point = max(run["held_out"], key=lambda point: point["prefix"] + point["prefix_fused"])
    for way in "acceptance", "acceptance_fused":
        acceptance = metadata[f"sbd.draft.{way}"]
        assert len(acceptance) == 4 and acceptance[0] == 1
        assert all(0 < a < 1 for a in acceptance[1:])
        assert acceptance == pytest.approx(point[way], abs=1e-4)
    vector = tensors.pop("sbd.draft.mask_embedding")
    assert vector.shape == (64,)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert types.pop("sbd.draft.mask_embedding") == "F32" and set(types.values()) == {"F16"}
    assert len(tensors) == 2 * 2 * 7
    with Engine(model_file, draft=out) as engine:
        assert not capfd.readouterr().err  # it is for this model
        plain = engine.generate("count 3:", max_tokens=40, decoder="ntp")
        drafted = engine.generate("count 3:", max_tokens=40, block_size=4)
        assert drafted.tokens == plain.tokens and drafted.stats.drafts.guesses > 0


def test_the_file_has_the_matrices_that_were_trained(base: Path, tmp_path: Path) -> None:
    """Merged into the model file's own tensors, in whose order its rows are."""
    from training.adapter_file import write_adapter

    objective = adapted("llama")
    file = open_model_file(base)
    loaded = load_model(file, "sdpa", torch.float32)
    frozen = {n.replace(".base_layer.", "."): w for n, w in objective.model.state_dict().items()}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(frozen[name], weight), name
    state = {n: p.data for n, p in objective.model.named_parameters() if p.requires_grad}
    prior = [1.0, 0.5, 0.5, 0.5]
    write_adapter(tmp_path / "adapter.gguf", file, state, 6.0, 4, prior, prior)
    _, stored = read_model(base)
    metadata, pairs = read_model(tmp_path / "adapter.gguf")
    for name in list(stored):
        if f"{name}.lora_a" in pairs:
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            stored[name] = stored[name] + metadata["adapter.lora.alpha"] / 4 * (b @ a)
    vector = torch.tensor(pairs["sbd.draft.mask_embedding"])
    assert torch.equal(vector, objective.model.get_parameter(MASK_EMBEDDING).data)
    merged = load_model(file, "sdpa", torch.float32)
    state = state_of(stored, True, 32)
    merged.load_state_dict(
        {n: torch.from_numpy(np.ascontiguousarray(w)) for n, w in state.items()}, strict=False
    )
    tokens = torch.arange(8, 30)[None]
    with torch.no_grad():
        ours, theirs = objective.model(tokens).logits, merged(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-2)  # F16 matrices


@pytest.mark.parametrize("measured_last", [True, False])
def test_a_resumed_run_is_the_unbroken_run(
    measured_last: bool, base: Path, answers: Path, tmp_path: Path
) -> None:
    """To the byte; the warmup's rate does not depend on the steps."""
    call = ["--model", base, "--answers", answers, *OPTIONS]
    unbroken, broken = tmp_path / "unbroken.gguf", tmp_path / "broken.gguf"
    assert train(*call, "--out", unbroken, "--steps", 8) == 0
    assert train(*call, "--out", broken, "--steps", 4) == 0
    if measured_last:
        broken.unlink()  # as if that save had been cut off just before its adapter
    assert train(*call, "--out", broken, "--steps", 8) == 0
    ours, theirs = run_of(broken), run_of(unbroken)
    assert ours["held_out"] == theirs["held_out"]
    assert ours["tokens"] == theirs["tokens"]
    assert unbroken.read_bytes() == broken.read_bytes()
    (resume,) = broken.with_suffix(".run").glob("resume-*")
    held = FileSystemReader(resume).read_metadata().state_dict_metadata
    weights = [name for name in held if name.startswith("model.")]
    assert weights and all("lora_" in name or MASK_EMBEDDING in name for name in weights)


def test_an_interrupted_run_goes_on(
    base: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def report(point: dict[str, Any], recipe: Recipe) -> None:
        if point["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    call = ["--model", base, "--answers", answers, *OPTIONS, "--steps", 5, "--save-every", 3]
    with monkeypatch.context() as patch:
        patch.setattr(command, "print_progress", report)
        assert train(*call, "--out", tmp_path / "broken.gguf") == 143
    assert "step 4 of 5 is saved in" in capfd.readouterr().err
    assert train(*call, "--out", tmp_path / "broken.gguf") == 0
    assert train(*call, "--out", tmp_path / "unbroken.gguf") == 0
    assert run_of(tmp_path / "broken.gguf") == run_of(tmp_path / "unbroken.gguf")


def test_it_learns_and_then_stops(base: Path, answers: Path, tmp_path: Path) -> None:
    call = ["--model", base, "--answers", answers, *OPTIONS, "--seed", "1"]
    out = tmp_path / "adapter.gguf"
    more = ["--steps", 60, "--save-every", 10, "--warmup-steps", 5]
    assert train(*call, "--out", out, *more) == 0
    curve = run_of(out)["loss"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    # A rate at which nothing is learnt: the third save has seen two without a better one.
    still = tmp_path / "still.gguf"
    slow = ["--steps", 60, "--learning-rate", "1e-12", "--patience", 2]
    assert train(*call, "--out", still, *slow) == 0
    assert [point["step"] for point in run_of(still)["held_out"]] == [2, 4, 6]
    before = still.read_bytes()
    assert train(*call, "--out", still, *slow) == 0  # and stays stopped
    assert run_of(still)["step"] == 6 and still.read_bytes() == before


def test_a_model_with_a_mask_of_its_own(answers: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen3")
    convert_quietly(tmp_path / "model", tmp_path / "model.gguf", type="q8_0", block_size=4)
    out = tmp_path / "adapter.gguf"
    call = ["--model", tmp_path / "model.gguf", "--answers", answers, "--out", out, *OPTIONS]
    assert train(*call, "--steps", 2) == 0
    metadata, tensors = read_model(out)
    assert metadata["general.architecture"] == "qwen3"
    assert "sbd.draft.mask_embedding" not in tensors
    file = open_model_file(tmp_path / "model.gguf")
    with Engine(file.path) as engine:
        assert file.mask_token_id == engine.model_config["mask_token_id"]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LINEAR_ROPE, "attention_bias": True}),
        ("mistral", {}),
        ("ministral3", {}),
        ("qwen2", {"rope_parameters": YARN_ROPE}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
)
def test_a_converted_model_is_the_checkpoint(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", model_type, **changes)
    convert_quietly(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ours = load_model(open_model_file(tmp_path / "model.gguf"), "sdpa", torch.float32)
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-4)


def test_nemotron(answers: Path, tmp_path: Path) -> None:
    """Its checkpoint, which transformers cannot open, is converted; its logits are the float64
    reference's; its adapter has all of the layers' matrices, and no mask."""
    tensors = random_tensors(NEMOTRON)
    folder = write_family(tmp_path / "checkpoint", NEMOTRON, tensors)
    out = tmp_path / "adapter.gguf"
    call = ["--model", folder, "--answers", answers, "--out", out, *OPTIONS, "--steps", 2]
    assert train(*call, "--length", 32) == 0
    (path,) = (tmp_path / "adapter.run").glob("model-*.gguf")
    file = open_model_file(path)
    ids = list(range(3, 60))
    with torch.no_grad():
        logits = load_model(file, "sdpa", torch.float32)(torch.tensor([ids])).logits[0].numpy()
    expected = family_logits(NEMOTRON, tensors, ids, visible(len(ids), 0))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    metadata, pairs = read_model(out)
    assert metadata["general.architecture"] == "mistral3"
    assert len(pairs) == 2 * 7 * file.config["num_hidden_layers"]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("llama", False)])
def test_a_quantised_base_is_dequantised(
    architecture: str, tied: bool, mix: str, tmp_path: Path
) -> None:
    """Against the float64 forward on what the gguf library makes of the file."""
    path = write_model(tmp_path / "model.gguf", architecture, MIXES[mix], tied)
    model = load_model(open_model_file(path), "sdpa", torch.float32)
    ids = list(range(1, 41))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    expected = reference_of(path, CONFIG).forward(ids, causal(len(ids)))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts", "a.jsonl", "--answers", "b"], "expected either --prompts or --answers"),
        (["--answers", "nowhere"], "nowhere: no such file or folder"),
        (["--held-out", "poems"], "--held-out poems: no prompt of that family: there are count"),
        (["--length", "4000"], "--length is 4000, expected at most 512, the context"),
        (["--block-size", "1"], "Invalid value for '--block-size'"),
        (["--rank", "0"], "Invalid value for '--rank'"),
        (["--slot-decay", "0"], "--slot-decay is 0.0, expected a number above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan, expected a number above 0"),
        (["--temperature", "-1"], "--temperature is -1.0, expected 0 or more"),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--micro-batch-size", "3"], "expected a multiple of 1 processes x micro_batch_size 3"),
        (["--out", "no/folder/here.gguf"], "expected a file in a folder that is there"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    says: str,
    base: Path,
    answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--model": str(base), "--answers": str(answers), "--out": str(tmp_path / "a.gguf")}
    call = [text for item in given.items() for text in item]
    assert train(*call, *OPTIONS, "--steps", 1, *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == []


def test_files_that_are_not_what_they_should_be(
    base: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, *options: object) -> None:
        call = ["--model", base, "--answers", answers, "--out", tmp_path / "a.gguf", "--steps", 1]
        assert train(*call, *OPTIONS, *options) == 2
        assert says in capsys.readouterr().err

    (tmp_path / "text.gguf").write_text("no model at all, however one reads it")
    refused("text.gguf: not a model file that can be read", "--model", tmp_path / "text.gguf")
    (tmp_path / "others.jsonl").write_text('{"tokens": [1, 2]}\n')
    refused("others.jsonl:1: expected an answer as", "--answers", tmp_path / "others.jsonl")
    line = {"prompt": "a", "prompt_ids": [1], "tokens": [5, 999], "options": {"temperature": 0}}
    (tmp_path / "far.jsonl").write_text(json.dumps(line))
    refused("far.jsonl:1: a token that is none of the 320", "--answers", tmp_path / "far.jsonl")
    (tmp_path / "few.jsonl").write_text(json.dumps({**line, "tokens": [5, 9]}))
    refused("1 answers, none of them to", "--answers", tmp_path / "few.jsonl")
    assert (
        train(
            "--model",
            base,
            "--answers",
            answers,
            "--out",
            tmp_path / "a.gguf",
            *OPTIONS,
            "--steps",
            1,
        )
        == 0
    )
    refused(
        "a.gguf: is a file of adapters, expected a model's",
        "--model",
        tmp_path / "a.gguf",
        "--out",
        tmp_path / "b.gguf",
    )
    refused("belongs to another run: --rank was 4, is 2", "--rank", 2)


def test_prompts_of_many_kinds() -> None:
    """All different; each kind's share of any beginning is the same; none without its words."""
    drawn = draft_prompts.prompts(per_kind=100, seed=0)
    kinds = [prompt["family"] for prompt in drawn]
    assert len({prompt["prompt"] for prompt in drawn}) == len(drawn) == 100 * len(set(kinds))
    assert len(draft_prompts.TRAINED) >= 10 and len(draft_prompts.HELD_OUT) == 2
    assert sorted(kinds[: len(set(kinds))]) == sorted(set(kinds))
    assert draft_prompts.prompts(5, 0) == drawn[: 5 * len(set(kinds))]
    assert draft_prompts.prompts(5, 1) != draft_prompts.prompts(5, 0)


def test_masks_are_no_tokens() -> None:
    """What fills a masked slot is not looked up in the embedding."""
    objective = adapted()
    batch = double([[Example(list(range(8, 20)), 3)]], 3, Masking(True), [torch.Generator()])
    tokens = batch.tokens[:, batch.clean :]
    with torch.no_grad():
        objective.model.get_parameter(MASK_EMBEDDING).fill_(7.0)
        embedded = objective._embedded(tokens)
    assert (embedded[tokens == MASKED] == 7).all() and (tokens == MASKED).any()
    assert (embedded[tokens != MASKED] != 7).all()
