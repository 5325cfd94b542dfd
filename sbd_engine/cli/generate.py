"""`sbd-engine generate`: many prompts answered, a JSON object a line."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdError, SbdValueError
from . import experiment, generation, options
from .options import print_json
from .prompt import template_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine import Engine
    from ..evaluation.journal import Journal
    from ..evaluation.questions import Question


@generation.with_flags(max_tokens=256, blocks=False)
def generate(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='Prompts, one a line, or "prompt", perhaps "family", in each line of a .jsonl '
            "file.",
            rich_help_panel=generation.INPUT,
        ),
    ],
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put each prompt into the model's chat template.",
            rich_help_panel=generation.INPUT,
        ),
    ] = False,
    template_arg: generation.TemplateArg = None,
    seed: options.Seed = 0,
    batch: Annotated[
        int,
        typer.Option(help="Prompts that share forwards.", rich_help_panel="Engine"),
    ] = 16,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write here instead of to standard output. Where the file is there already, the "
            "run goes on from it.",
            rich_help_panel=generation.OUTPUT,
        ),
    ] = None,
    debug: options.Debug = False,
    **flags: Any,
) -> int:
    """Answer many prompts: a JSON object a line, as each is done.

    It has the prompt and its number in the file, the text, both as token ids,
    why it ended, and the options that it was made with. Sampled texts of one
    seed differ by their prompts' numbers, which are their sample_index.
    """
    from ..evaluation.journal import Journal
    from ..evaluation.questions import read_prompts
    from ..parameters import integer

    if template_arg and not chat:
        raise SbdValueError("--template-arg has no effect without --chat: give both")
    batch = integer("--batch", batch, 1)
    questions = read_prompts(prompts)
    with generation.engine(context) as engine:
        asked = generation.asked(context)
        arguments = dict(map(template_argument, template_arg or ()))
        calls = _calls(engine, questions, asked, arguments if chat else None)
        generation.check_engine(context, engine)
        settings = _settings(context, engine, questions, asked, arguments)
        with Journal(out, settings, lambda line: _fits(line, questions)) as journal:
            experiment.note_left_out(journal)
            interrupted = _answer(engine, questions, calls, journal, batch, out is None)
            count = len(journal.lines)
    if interrupted:
        experiment.note_interruption(count, len(questions), out, "prompts")
    return 130 if interrupted else 0


def _calls(
    engine: Engine,
    questions: Sequence[Question],
    asked: dict[str, Any],
    template: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Engine.generate's arguments for each, checked before anything is written."""
    from ..evaluation.answering import encoded

    sampled = asked.get("temperature", 0) > 0
    calls = []
    for number, question in enumerate(questions):
        call = {**asked, "sample_index": number} if sampled else {**asked}
        try:
            call["prompt"] = encoded(engine, question.prompt, template)
            engine.check(**call)
        except SbdError as error:
            raise type(error)(f"{question.source}: {error}") from None
        calls.append(call)
    return calls


def _settings(
    context: typer.Context,
    engine: Engine,
    questions: Sequence[Question],
    asked: dict[str, Any],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """What must be equal for a run to go on from its answers. Threads, batch and whatever drafts
    change none."""
    from ..evaluation.answering import file_fingerprint
    from ..evaluation.questions import questions_fingerprint
    from ..json_values import finite
    from ..model_file import model_file

    flags = context.params
    with model_file(options.one_model(flags["model"], flags["model_flag"])) as path:
        content = file_fingerprint(path)
    resolved: dict[str, Any] = finite(engine.resolve(**asked))
    return {
        "model": content,
        "prompts": questions_fingerprint(questions),
        "chat": flags["chat"],
        "template_args": arguments,
        "options": resolved,
        "n_ctx": engine.n_ctx,
        "kv_dtype": flags["kv_dtype"],
    }


def _fits(line: dict[str, Any], questions: Sequence[Question]) -> bool:
    number = line.get("number")
    if not isinstance(number, int) or not 0 <= number < len(questions):
        return False
    tokens = line.get("tokens")
    return line.get("prompt") == questions[number].prompt and isinstance(tokens, list)


def _answer(
    engine: Engine,
    questions: Sequence[Question],
    calls: Sequence[dict[str, Any]],
    journal: Journal,
    batch: int,
    printed: bool,
) -> bool:
    """Answers what the journal lacks; True where Ctrl-C cut it off."""
    from ..json_values import finite
    from .console import progress

    done = {line["number"] for line in journal.lines}
    left = [number for number in range(len(calls)) if number not in done]
    started, new_tokens = time.perf_counter(), 0
    try:
        with (
            progress("answers", len(calls)) as show,
            closing(engine.generate_each([calls[n] for n in left], at_once=batch)) as answers,
        ):
            show(len(done))
            for index, completion in answers:
                number = left[index]
                question, call = questions[number], calls[number]
                line = {"number": number, "prompt": question.prompt}
                if question.family:
                    line["family"] = question.family
                in_force = engine.resolve(**{k: v for k, v in call.items() if k != "prompt"})
                line |= {
                    "prompt_ids": call["prompt"],
                    "text": completion.text,
                    "tokens": completion.tokens,
                    "finish_reason": completion.finish_reason,
                    "nfe": completion.stats.nfe,
                    "options": finite(in_force),
                }
                journal.append(line)
                if printed:
                    print_json(line)
                new_tokens += len(completion.tokens)
                show(len(journal.lines))
    except KeyboardInterrupt:
        return True
    seconds = time.perf_counter() - started
    if left:
        options.note(
            f"{len(left)} answers, {new_tokens} tokens, {new_tokens / seconds:.1f} tok/s, "
            f"{sum(line['finish_reason'] == 'stop' for line in journal.lines)} of "
            f"{len(journal.lines)} ended by themselves"
        )
    return False
