"""Many texts on Ray Data: classes for `Dataset.map_batches`, and a run that can go on.

    from sbd_engine.on_ray_data import Generate

    prompts = ray.data.read_json("prompts.jsonl")
    done = prompts.map_batches(
        Generate,
        fn_constructor_kwargs={"model": "model.bin", "max_tokens": 64},
        batch_format="pyarrow",
        batch_size=16,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )

Results are the library's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from .engine import Engine
from .errors import SbdError, SbdTypeError, SbdValueError
from .evaluation.answering import encoded
from .evaluation.answers import Answers
from .evaluation.questions import Question, read_prompts
from .evaluation.scoring import EXACT, check_answer, is_right
from .model_file import ModelPath
from .parameters import integer, named
from .ray_cores import threads_here


class _Worker:
    """An engine per worker process, of one thread for each of its cores."""

    def __init__(self, model: ModelPath | None, engine: Mapping[str, Any] | None) -> None:
        self._engine = _open(model, engine)

    @staticmethod
    def _column(batch: pa.Table, name: str) -> list[Any]:
        if not isinstance(batch, pa.Table):
            raise SbdTypeError(
                f"expected a pyarrow.Table, got {type(batch).__name__}: give map_batches "
                'batch_format="pyarrow"'
            )
        if name not in batch.column_names:
            got = ", ".join(batch.column_names)
            raise SbdValueError(f"expected a column `{name}`, got only {got}")
        column: list[Any] = batch[name].to_pylist()
        return column


class Generate(_Worker):
    """Adds `text`, `tokens`, `finish_reason` and `nfe` to rows with a `prompt` (a string, or token
    ids); to rows with an `answer` also whether the text is `right`, by their `score` (exact).

    chat: prompts go into the model's chat template. engine: arguments of Engine. options: of
    Engine.generate. Where they sample, texts of one seed differ by their rows' `number`, which they
    must have.
    """

    def __init__(
        self,
        model: ModelPath | None = None,
        *,
        chat: bool = False,
        engine: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, engine)
        self._template: dict[str, Any] | None = {} if chat else None
        self._options = options

    def __call__(self, batch: pa.Table) -> pa.Table:
        calls = [{"prompt": self._ids(each)} for each in self._column(batch, "prompt")]
        if (self._options.get("temperature") or 0) > 0:
            numbers = self._column(batch, "number")
            calls = [{**call, "sample_index": n} for call, n in zip(calls, numbers, strict=True)]
        at_once = max(1, len(calls))
        done = dict(self._engine.generate_each(calls, at_once=at_once, **self._options))
        texts = [done[n] for n in range(len(calls))]
        added = {
            "text": pa.array([each.text for each in texts], pa.string()),
            "tokens": pa.array([each.tokens for each in texts], pa.list_(pa.int64())),
            "finish_reason": pa.array([each.finish_reason for each in texts], pa.string()),
            "nfe": pa.array([each.stats.nfe for each in texts], pa.int64()),
        }
        if "answer" in batch.column_names:
            added["right"] = pa.array(self._right(batch, [each.text for each in texts]), pa.bool_())
        return _with(batch, added)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return encoded(self._engine, prompt, self._template) if isinstance(prompt, str) else prompt

    def _right(self, batch: pa.Table, texts: Sequence[str]) -> list[bool]:
        answers = self._column(batch, "answer")
        scores = [EXACT] * len(texts)
        if "score" in batch.column_names:
            scores = [each or EXACT for each in self._column(batch, "score")]
        for score, answer in zip(scores, answers, strict=True):
            check_answer(score, answer)
        return [is_right(*each) for each in zip(scores, texts, answers, strict=True)]


class Score(_Worker):
    """Adds `tokens` and their `logprobs`, of which the first is null, to rows with a `text` (a
    string, or token ids), as Engine.score has them."""

    def __init__(
        self, model: ModelPath | None = None, *, engine: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(model, engine)

    def __call__(self, batch: pa.Table) -> pa.Table:
        scores = [self._engine.score(text) for text in self._column(batch, "text")]
        return _with(
            batch,
            {
                "tokens": pa.array([each.tokens for each in scores], pa.list_(pa.int64())),
                "logprobs": pa.array([each.logprobs for each in scores], pa.list_(pa.float64())),
            },
        )


def generate(
    prompts: Path | str,
    out: Path | str,
    *,
    model: ModelPath | None = None,
    workers: int = 1,
    num_cpus: int = 1,
    num_gpus: int = 0,
    batch: int = 16,
    chat: bool = False,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> int:
    """`sbd-engine generate --prompts prompts --out out` by as many workers: the same lines in the
    same file, from which either goes on where the other was cut off. How many answers are new.

    num_cpus, num_gpus: of each worker. batch: prompts that share its forwards. engine: arguments of
    Engine; its model file is at the same place on all machines. options: of Engine.generate.
    Raises SbdError, and what Ray has where workers fail.
    """
    batch = integer(named("batch"), batch, 1)
    has = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    questions = read_prompts(Path(prompts))
    prepare = ray.remote(**has)(_prepare)
    template: dict[str, Any] | None = {} if chat else None
    try:
        answers: Answers = ray.get(prepare.remote(model, engine, questions, options, template))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SbdError) else error) from None
    with answers.journal(Path(out)) as journal:
        left = answers.left(journal)
        blocks = [
            pa.table(
                {
                    "number": numbers,
                    "prompt": pa.array(
                        [answers.calls[n]["prompt"] for n in numbers], pa.list_(pa.int64())
                    ),
                }
            )
            for numbers in (left[n : n + batch] for n in range(0, len(left), batch))
        ]
        if blocks:
            done = ray.data.from_arrow(blocks).map_batches(
                Generate,
                fn_constructor_args=(model,),
                fn_constructor_kwargs={"engine": engine, **options},
                batch_format="pyarrow",
                batch_size=batch,
                compute=ray.data.ActorPoolStrategy(size=workers),
                **has,
            )
            for row in done.iter_rows():
                del row["prompt"]
                journal.append(answers.line(**row))
    return len(left)


def _open(model: ModelPath | None, options: Mapping[str, Any] | None) -> Engine:
    given = dict(options or {})
    given.setdefault("n_threads", threads_here(given.get("device", "auto")))
    return Engine(model, **given)


def _prepare(
    model: ModelPath | None,
    engine: Mapping[str, Any] | None,
    questions: Sequence[Question],
    options: Mapping[str, Any],
    template: Mapping[str, Any] | None,
) -> Answers:
    """Where the model is: the machine that asks may have no room for it."""
    kv_dtype = (engine or {}).get("kv_dtype", "f16")
    path = None if model is None else Path(model)
    with _open(model, engine) as opened:
        return Answers.asked(opened, path, kv_dtype, questions, options, template)


def _with(batch: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, column in columns.items():
        if name in batch.column_names:
            batch = batch.drop_columns([name])
        batch = batch.append_column(name, column)
    return batch
