"""The reference forward against transformers; row statistics; the random models."""

from __future__ import annotations

from collections.abc import Iterator
from math import log, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.model import ReferenceModel, causal, rope_frequencies, with_block
from reference.random_model import RandomModel, random_model, round_weights, write_checkpoint
from reference.stats import filtered_distribution, row_stats

SEEDS = range(24)  # every combination of architecture, RoPE scaling and tying


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; NaN if any is NaN."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


# The forward against transformers


@pytest.fixture
def torch() -> Iterator[Any]:
    """torch in float64 and on one thread: matrices this small only wait for a second one."""
    torch = pytest.importorskip("torch")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield torch
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def compare_with_transformers(
    model: RandomModel, folder: Path, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        write_checkpoint(model, folder), dtype=torch.float64, attn_implementation="eager"
    )
    # transformers casts to float32 by name in RoPE, norms and softmax: let the name mean float64.
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)

    ids = [*model.prompt(30), *[model.mask_id] * 7]
    n = len(ids)
    ragged = np.random.default_rng(n).integers(1, n + 1, n)
    for kv_end in (causal(n), with_block(n, 7), ragged):
        additive = np.where(np.arange(n) < kv_end[:, None], 0.0, -np.inf)
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.tensor(additive)[None, None],
                use_cache=False,
            ).logits[0]
        assert expected.dtype == torch.float64
        assert relative_error(model.reference().forward(ids, kv_end), expected.numpy()) <= 1e-10


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_match_transformers(
    seed: int, torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_transformers(random_model(seed), tmp_path, torch, monkeypatch)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_yarn_and_scaled_queries_match_transformers(
    seed: int, equal: bool, torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ministral 3, whose graph is Llama's with these: so is Nemotron-Labs-Diffusion's."""
    model = random_model(seed, "llama", rope="yarn")
    config = model.config
    scaling = config.get("rope_parameters") or config["rope_scaling"]
    if not equal:
        scaling["mscale"] = 0.7  # cosines and sines are scaled too
    scaling["rope_theta"] = scaling.get("rope_theta", config.get("rope_theta"))
    ministral = {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "rope_parameters": scaling,
        "sliding_window": None,
    }

    class Ministral(RandomModel):
        """Llama's forward by the config of Ministral 3."""

        def reference(self) -> ReferenceModel:
            return ReferenceModel(self.config | {"model_type": "llama"}, self.tensors)

    dropped = ("rope_theta", "rope_scaling", "attention_bias")
    kept = {key: value for key, value in config.items() if key not in dropped}
    compare_with_transformers(
        Ministral(kept | ministral, model.tensors), tmp_path, torch, monkeypatch
    )


def test_seeds_cover_every_combination() -> None:
    def kind(model: RandomModel) -> tuple[Any, ...]:
        rope = model.config.get("rope_parameters") or model.config["rope_scaling"] or {}
        return (
            model.config["model_type"],
            rope.get("rope_type", "default"),
            "lm_head.weight" in (model.tensors),
        )

    assert len({kind(random_model(seed)) for seed in SEEDS}) == 4 * 3 * 2


def test_rope_config_forms_agree() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8 * 2 * pi  # so a wavelength's turns are 8 f
    old = {"rope_theta": 256.0, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_theta": 256.0, "rope_type": "llama3", **scaling}}
    # f = 1, 1/4, 1/16 turn 8, 2 and 1/2 times: kept, s = (2 - 1) / (4 - 1), divided
    expected = [1.0, (2 / 3) / 8 / 4 + (1 / 3) / 4, 1 / 16 / 8]
    frequencies = rope_frequencies(old, 8)[[0, 1, 2]]
    assert frequencies == pytest.approx(expected, rel=1e-14)
    assert np.array_equal(rope_frequencies(old, 8), rope_frequencies(new, 8))
    assert rope_frequencies({}, 4) == pytest.approx([1.0, 0.01])


@pytest.mark.parametrize("seed", range(4))
def test_last_rows_alone(seed: int) -> None:
    model = random_model(seed)
    ids, kv_end = model.prompt(20), with_block(20, 5)
    whole = model.reference().forward(ids, kv_end)
    for last in (1, 5, 20):
        part = model.reference().forward(ids, kv_end, last=last)
        assert part.shape == (last, model.config["vocab_size"])
        assert relative_error(part, whole[-last:]) <= 1e-13


def test_every_tensor_is_used() -> None:
    model = random_model(2)
    name = "model.layers.0.self_attn.k_proj.bias"
    without = {k: v for k, v in model.tensors.items() if k != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        ReferenceModel(model.config, without)
    with pytest.raises(ValueError, match="without a use: extra"):
        ReferenceModel(model.config, {**model.tensors, "extra": np.zeros(1)})
    with pytest.raises(ValueError, match="expected shape"):
        ReferenceModel(model.config, {**model.tensors, name: np.zeros(1)})


# Random models


def test_checkpoint_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = random_model(5)
    path = write_checkpoint(model, tmp_path / "made") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == model.config["vocab_size"]
    assert tokenizer.token_to_id("<mask>") == model.mask_id
    assert tokenizer.token_to_id("<eos>") == model.eos_ids[0]
    prompt = model.prompt(10)
    assert tokenizer.encode(" ".join(f"t{i}" for i in prompt)).ids == prompt


@pytest.mark.parametrize("seed", range(4))
def test_rounded_weights(seed: int) -> None:
    pytest.importorskip("gguf")
    tensors = random_model(seed, multiple_of_32=True).tensors
    for dtype in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        for name, actual in round_weights(tensors, dtype).items():
            exact = tensors[name]
            assert actual.shape == exact.shape and actual.dtype == np.float32
            if exact.ndim == 1 or dtype == "f32":
                assert np.array_equal(actual, exact)
                continue
            # Half a unit in the last place, or half a step of the group's scale, which is itself
            # rounded to f16. With 4 bits the end opposite to the extreme is a whole step short.
            groups = np.abs(exact).reshape(-1, 32).max(axis=1, keepdims=True)
            bound = {
                "f16": np.abs(exact) * 2.0**-11 + 2.0**-25,
                "bf16": np.abs(exact) * 2.0**-8,
                "q8_0": np.broadcast_to(groups / 127 * 0.57, (groups.size, 32)),
                "q4_0": np.broadcast_to(groups / 8 * 1.01, (groups.size, 32)),
            }[dtype].reshape(exact.shape)
            assert np.all(np.abs(actual - exact) <= bound), (dtype, name)
            assert not np.array_equal(actual, exact)


# Statistics of a row

MASK = 4
LOGITS = np.log([4.0, 2.0, 1.0, 1.0, 1e9])  # 1/2, 1/4, 1/8, 1/8 and a mask that would win


def test_row_stats_by_hand() -> None:
    stats = row_stats(np.stack([LOGITS, LOGITS + 1000.0]), MASK)
    assert stats.argmax.tolist() == [0, 0]
    assert stats.top_prob == pytest.approx([0.5, 0.5])
    assert stats.margin == pytest.approx([0.25, 0.25])
    assert stats.log_z == pytest.approx([log(8), 1000 + log(8)])
    assert stats.entropy == pytest.approx([1.75 * log(2)] * 2)
    assert stats.logit_gap == pytest.approx([log(2)] * 2)


def test_row_stats_extremes() -> None:
    certain, even = [0.0, -1000.0, -1000.0, -1000.0, 5.0], [3.0, 3.0, 3.0, 3.0, 5.0]
    stats = row_stats(np.array([certain, even]), MASK)
    assert stats.entropy.tolist() == [0.0, pytest.approx(log(4))]
    assert stats.top_prob.tolist() == [1.0, 0.25]
    assert stats.argmax.tolist() == [0, 0]  # the lowest id among equals
    assert stats.logit_gap.tolist() == [1000.0, 0.0]
    assert row_stats(np.array([even]), None).argmax.tolist() == [MASK]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "weights"),
    [
        (1.0, 0, 1.0, [4, 2, 1, 1, 0]),
        (0.5, 0, 1.0, [16, 4, 1, 1, 0]),
        (1.0, 3, 1.0, [4, 2, 1, 0, 0]),  # of equals the lower id stays
        (1.0, 0, 0.7, [4, 2, 0, 0, 0]),  # 1/2 < 0.7 <= 3/4
        (1.0, 0, 0.8, [4, 2, 1, 0, 0]),
        (1.0, 2, 0.6, [1, 0, 0, 0, 0]),  # top-k first: 2/3 >= 0.6, while 1/2 < 0.6
        (0.5, 0, 0.7, [1, 0, 0, 0, 0]),  # temperature first: 16/22 >= 0.7
        (0.0, 0, 1.0, [1, 0, 0, 0, 0]),
    ],
)
def test_filtered_distribution(
    temperature: float, top_k: int, top_p: float, weights: list[float]
) -> None:
    expected = np.array(weights) / sum(weights)
    assert filtered_distribution(LOGITS, temperature, top_k, top_p, MASK) == pytest.approx(expected)
