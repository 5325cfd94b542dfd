"""What a draft adapter gains on a real model: the same prompts by next-token decoding, by drafts
and, where llama-cpp-python is installed, by llama.cpp, greedily and with its prompt lookup; in
turn, in one run, alone and in batches.

Every answer counts from its prompt to its end. Texts by drafts are checked to be next-token
decoding's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from options import DOCS, Parser, at_least, integers, offer_plain_llama, run
from page import Table, page, print_table, write_docs
from peers.process import PeerError, Process
from peers.worker import Missing

from sbd_engine.evaluation import plots
from sbd_engine.evaluation.intervals import Columns, Estimate, bootstrap, ratio

TEMPERATURE = 0.7  # beside greedy
NTP, DRAFTS, GREEDY, LOOKUP = "ntp", "drafts", "llama.cpp greedy", "llama.cpp prompt lookup"
LOOPS = 12  # tokens at an answer's end that say one thing three times: it has come to loop

Prompt = dict[str, Any]  # a line of held_out.jsonl
Group = dict[str, Any]  # of prompts that were answered together: what each way took


def main() -> None:
    parser = Parser(__doc__ or "", rounds=1)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="of several types")
    parser.add_argument("--draft", type=Path, required=True, help="their adapter")
    parser.add_argument(
        "--run", type=Path, required=True, help="the folder that the adapter was trained in"
    )
    parser.add_argument("--per-kind", type=at_least(1), default=8, help="prompts of each kind")
    parser.add_argument("--max-tokens", type=at_least(2), default=192, help="of an answer")
    parser.add_argument("--batch", type=integers(1), default="1,8", help="answers at once")
    offer_plain_llama(parser)
    args = parser.parse_args()
    training = json.loads((args.run / "training.json").read_text())
    report: dict[str, Any] = {
        "threads": args.threads,
        "draft": args.draft.name,
        "training": training["held_out"],
        "models": [],
    }
    for path in args.models:
        report["models"].append(measure(path, args))
    file = args.work_dir / "drafts.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    for each in tables(report):
        print_table(each)
    print(f"wrote {file}", file=sys.stderr)
    if args.write_docs:
        save_plot(report, DOCS / "results-real.png")
        write_docs(DOCS / "results-real.md", "training", page([training_table(report)]))
        write_docs(DOCS / "results-real.md", "drafts", docs_section(report))


def chosen(file: Path, per_kind: int) -> list[Prompt]:
    """So many prompts of each family, shuffled."""
    families: dict[str, list[Prompt]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        families.setdefault(prompt["family"], []).append(prompt)
    prompts = [prompt for family in families.values() for prompt in family[:per_kind]]
    Random(0).shuffle(prompts)
    return prompts


def measure(path: Path, args: Any) -> dict[str, Any]:
    """What each way took for each group of prompts, by temperature and by how many share it."""
    prompts = chosen(args.run / "held_out.jsonl", args.per_kind)
    longest = max(len(prompt["prompt_ids"]) for prompt in prompts) + args.max_tokens
    with ExitStack() as stack:
        ways, about = start(path, longest, args, stack)
        parts = []
        for temperature in 0.0, TEMPERATURE:
            for batch in args.batch:
                print(f"{path.name}, temperature {temperature}, {batch} at once", file=sys.stderr)
                fit = {name: ways[name] for name in ways if able(name, temperature, batch)}
                groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
                done = list(answered(groups, fit, args, temperature))
                parts.append({"temperature": temperature, "batch": batch, "groups": done})
    return {"model": path.name, "about": about, "parts": parts}


Way = Callable[..., dict[str, Any]]  # answers prompts


def start(path: Path, n_ctx: int, args: Any, stack: ExitStack) -> tuple[dict[str, Way], list[str]]:
    options = {"path": str(path.absolute()), "threads": args.threads}
    log = str(args.work_dir / path.stem)
    ours = Process(
        "peers.ours",
        {**options, "n_ctx": n_ctx, "generate": True, "draft": str(args.draft.absolute())},
        Path(f"{log}.sbd-engine.log"),
    )
    stack.callback(ours.close)

    def by(decoder: str) -> Way:
        def way(ids: list[list[int]], temperature: float, seed: int) -> dict[str, Any]:
            done: dict[str, Any] = ours.call(
                "answers",
                prompts=ids,
                decoder=decoder,
                temperature=temperature,
                seed=seed,
                max_tokens=args.max_tokens,
            )
            return done

        return way

    ways, about = {NTP: by("ntp"), DRAFTS: by("sbd_lossless")}, [ours.about]
    try:
        llama = Process(
            "peers.llama_answers",
            {
                **options,
                "n_ctx": n_ctx,
                "sequences": max(args.batch),
                "plain": args.plain_llama,
            },
            Path(f"{log}.llama.cpp.log"),
        )
    except (Missing, PeerError) as error:
        print(f"skipping llama.cpp: {error}", file=sys.stderr)
        return ways, about
    stack.callback(llama.close)

    def greedy(lookup: bool) -> Way:
        def way(ids: list[list[int]], temperature: float, seed: int) -> dict[str, Any]:
            done: dict[str, Any] = llama.call(
                "answers", prompts=ids, max_tokens=args.max_tokens, lookup=lookup
            )
            return done

        return way

    return {**ways, GREEDY: greedy(False), LOOKUP: greedy(True)}, [*about, llama.about]


def able(name: str, temperature: float, batch: int) -> bool:
    """llama.cpp's own samplers give other texts, and its lookup drafts for one sequence."""
    return name in (NTP, DRAFTS) or (temperature == 0 and (batch == 1 or name == GREEDY))


def answered(
    groups: Sequence[Sequence[Prompt]], ways: dict[str, Way], args: Any, temperature: float
) -> Iterator[Group]:
    names = list(ways)
    for seed, group in enumerate(groups):
        ids = [prompt["prompt_ids"] for prompt in group]
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for n in range(args.rounds):
            turn = (seed + n) % len(names)
            for name in names[turn:] + names[:turn]:
                done[name].append(ways[name](ids, temperature, seed))
        texts = {name: each[0]["tokens"] for name, each in done.items()}
        if texts[DRAFTS] != texts[NTP]:
            raise RuntimeError("drafts: another text than next-token decoding's")
        families = {prompt["family"] for prompt in group}
        yield {
            "family": families.pop() if len(families) == 1 else None,
            "loops": sum(map(comes_to_loop, texts[NTP])),
            "ways": {
                name: {
                    "tokens": sum(map(len, texts[name])),
                    "forwards": each[0]["forwards"],
                    "seconds": median(one["seconds"] for one in each),
                }
                for name, each in done.items()
            },
        }


def comes_to_loop(tokens: list[int]) -> bool:
    """Whether its end is one run of tokens, LOOPS tokens or longer in all, three times or more."""
    for period in range(1, len(tokens) // 3 + 1):
        if 3 * period >= LOOPS and tokens[-period:] * 2 == tokens[-3 * period : -period]:
            return True
    return False


def taken(groups: Sequence[Group], name: str, what: str) -> list[float]:
    return [group["ways"][name][what] for group in groups]


def rate(groups: Sequence[Group], name: str) -> Estimate:
    """Tokens per second."""
    return ratio(taken(groups, name, "tokens"), taken(groups, name, "seconds"))


def per_forward(groups: Sequence[Group], name: str) -> Estimate:
    return ratio(taken(groups, name, "tokens"), taken(groups, name, "forwards"))


def gain(groups: Sequence[Group], name: str, base: str) -> Estimate:
    """Of its tokens per second over those of another way, on the same prompts."""
    columns = [taken(groups, way, what) for way in (name, base) for what in ("tokens", "seconds")]
    return bootstrap(columns, _quotient)


def _quotient(tokens: Columns, seconds: Columns, others: Columns, theirs: Columns) -> Columns:
    return tokens / seconds / (others / theirs)


def tables(report: dict[str, Any]) -> list[Table]:
    parts = [(model, part) for model in report["models"] for part in model["parts"]]
    alone = [(model, part) for model, part in parts if part["batch"] == 1]
    lines = [line(model, part) for model, part in parts]
    others = "times llama.cpp's tok/s"
    header = ["model", "temperature", "at once", "ntp, tok/s", "drafts, tok/s", "times ntp's"]
    return [
        Table(
            "speed",
            [*header, "tok/forward", f"ntp: {others}", f"drafts: {others}", "with lookup"],
            lines,
        ),
        *(kinds_table(model, part) for model, part in alone if part["temperature"] == 0),
    ]


def line(model: dict[str, Any], part: dict[str, Any]) -> list[str]:
    groups = part["groups"]
    there = groups[0]["ways"]
    return [
        model["model"],
        f"{part['temperature']:g}",
        str(part["batch"]),
        *(f"{rate(groups, name).value:.0f}" for name in (NTP, DRAFTS)),
        shown(gain(groups, DRAFTS, NTP)),
        shown(per_forward(groups, DRAFTS)),
        *(
            shown(gain(groups, name, base)) if name in there and base in there else ""
            for name, base in ((NTP, GREEDY), (DRAFTS, GREEDY), (LOOKUP, GREEDY))
        ),
    ]


def by_kind(groups: Sequence[Group]) -> dict[str, list[Group]]:
    kinds: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: str(group["family"])):
        kinds.setdefault(group["family"], []).append(group)
    return kinds


def kinds_table(model: dict[str, Any], part: dict[str, Any]) -> Table:
    """Greedy answers one at a time; those that come to loop, and those that do not, apart too."""
    groups = part["groups"]
    kinds = by_kind(groups)
    kinds["texts that loop"] = [g for g in groups if g["loops"]]
    kinds["other texts"] = [g for g in groups if not g["loops"]]
    lines = [
        [
            kind,
            str(len(mine)),
            shown(per_forward(mine, DRAFTS)),
            shown(gain(mine, DRAFTS, NTP)),
            shown(gain(mine, LOOKUP, GREEDY)) if LOOKUP in mine[0]["ways"] else "",
        ]
        for kind, mine in kinds.items()
        if mine
    ]
    header = ["kind", "answers", "tok/forward", "drafts: times ntp", "lookup: times llama.cpp"]
    return Table(f"by kind of prompt, {model['model']}", header, lines)


def training_table(report: dict[str, Any]) -> Table:
    """How far drafts on held-out answers agreed as training went on."""
    points = report["training"]
    slots = range(1, len(points[0]["acceptance"]))
    lines = [
        [
            f"{point['tokens'] / 1e6:.2f} M",
            *(f"{100 * point['acceptance'][slot]:.0f}" for slot in slots),
            f"{point['prefix']:.2f}",
            f"{point['prefix_fused']:.2f}",
        ]
        for point in points
    ]
    header = ["tokens", *(f"slot {slot}, %" for slot in slots)]
    header += ["agree behind a known token", "behind one that the same forward decides"]
    return Table("training", header, lines)


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Speed by kind of prompt, of the first model's greedy answers one at a time."""
    part = next(p for p in report["models"][0]["parts"] if p["batch"] == 1)
    figure, (axis,) = plots.panels(1, (6.2, 4.6))
    gains = {kind: gain(mine, DRAFTS, NTP) for kind, mine in by_kind(part["groups"]).items()}
    places = range(len(gains))
    for place, each in zip(places, gains.values(), strict=True):
        axis.plot([each.low, each.high], [place, place], color=plots.COLOURS[0])
        axis.plot([each.value], [place], "o", color=plots.COLOURS[0])
    axis.axvline(1.0, color="#888888", linewidth=1)
    axis.set_yticks(list(places), list(gains))
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second by drafts over next-token decoding's, 95 %")
    axis.set_title(f"{report['models'][0]['model']}, greedy, one at a time")
    plots.save(figure, path)


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def docs_section(report: dict[str, Any]) -> str:
    about = "; ".join(dict.fromkeys(one for model in report["models"] for one in model["about"]))
    return page(
        [
            f"{report['threads']} threads; {about}; adapter {report['draft']}.",
            "![Speed over next-token decoding's by kind of prompt](results-real.png)",
            *tables(report),
        ],
        "**{}**",
    )


if __name__ == "__main__":
    run(main)
