"""`sbd-engine generate`: many prompts answered, a JSON object a line."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from . import experiment, generation, options
from .options import print_json
from .prompt import template_argument

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.answers import Answers
    from ..evaluation.journal import Journal


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
    from ..evaluation.answers import Answers
    from ..evaluation.questions import read_prompts
    from ..parameters import integer

    if template_arg and not chat:
        raise SbdValueError("--template-arg has no effect without --chat: give both")
    batch = integer("--batch", batch, 1)
    questions = read_prompts(prompts)
    with generation.engine(context) as engine:
        template = dict(map(template_argument, template_arg or ())) if chat else None
        answers = Answers.asked(
            engine,
            options.one_model(model, model_flag),
            context.params["kv_dtype"],
            questions,
            generation.asked(context),
            template,
        )
        generation.check_engine(context, engine)
        with answers.journal(out) as journal:
            experiment.note_left_out(journal)
            interrupted = _answer(engine, answers, journal, batch, out is None)
            count = len(journal.lines)
    if interrupted:
        experiment.note_interruption(count, len(questions), out, "prompts")
    return 130 if interrupted else 0


def _answer(engine: Engine, answers: Answers, journal: Journal, batch: int, printed: bool) -> bool:
    """Answers what the journal lacks; True where Ctrl-C cut it off."""
    from .console import progress

    left = answers.left(journal)
    calls = [answers.calls[number] for number in left]
    started, new_tokens = time.perf_counter(), 0
    try:
        with (
            progress("answers", len(answers.calls)) as show,
            closing(engine.generate_each(calls, at_once=batch)) as completions,
        ):
            show(len(journal.lines))
            for index, done in completions:
                line = answers.line(
                    left[index], done.text, done.tokens, done.finish_reason, done.stats.nfe
                )
                journal.append(line)
                if printed:
                    print_json(line)
                new_tokens += len(done.tokens)
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
