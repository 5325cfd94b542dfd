"""Prompts to train draft adapters on: `python -m training.draft_prompts --out prompts.jsonl`.

Of each kind so many different ones, all drawn from the words below; the last two kinds are meant to
be held out (`training.draft --held-out`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

NAMES = (
    "Anna Ben Clara David Ella Farid Grace Hugo Ines Jonas Kira Liam Mona Noah Olga Paul".split()
)
JOBS = "teacher nurse baker gardener pilot plumber librarian farmer chef carpenter dentist".split()
PLACES = (
    "a library",
    "a small harbour",
    "a train station",
    "a mountain hut",
    "an old theatre",
    "a market",
    "a school garden",
    "a lighthouse",
    "a busy kitchen",
    "a quiet museum",
)
ANIMALS = "fox owl cat turtle horse mouse crow rabbit bear frog goose hedgehog".split()
THINGS = "umbrella lantern bicycle violin clock map kettle letter coat key mirror basket".split()
FEELINGS = "curious lonely proud nervous cheerful tired grateful jealous brave bored".split()
FOODS = "apples pears eggs loaves oranges carrots tomatoes lemons potatoes plums".split()
TOPICS = (
    "photosynthesis",
    "inflation",
    "gravity",
    "the water cycle",
    "recursion",
    "vaccines",
    "compound interest",
    "plate tectonics",
    "the greenhouse effect",
    "electric current",
    "evolution",
    "supply and demand",
    "binary numbers",
    "the tides",
    "encryption",
    "sleep",
    "soil erosion",
    "black holes",
    "democracy",
    "machine learning",
    "fermentation",
    "the stock market",
    "echoes",
    "rainbows",
)
LISTENERS = (
    "a child of ten",
    "a beginner",
    "an older neighbour",
    "a new colleague",
    "somebody in a hurry",
    "a curious student",
)
GOALS = (
    "sleeping better",
    "learning a language",
    "saving money",
    "staying focused at work",
    "eating more vegetables",
    "keeping houseplants alive",
    "preparing for an interview",
    "writing clear e-mails",
    "running a first 5 km",
    "packing for a trip",
    "making new friends",
    "reading more books",
    "giving a short talk",
    "tidying a small flat",
)
COUNTRIES = (
    "Norway Japan Brazil Egypt Canada Kenya Portugal India Chile Greece Vietnam Poland Mexico "
    "Iceland Morocco Thailand Peru Ireland Turkey Finland"
).split()
PYTHON = (
    "returns the sum of the squares of a list of numbers",
    "counts the vowels in a string",
    "checks whether a word is a palindrome",
    "removes duplicates from a list and keeps the order",
    "finds the second largest number in a list",
    "merges two sorted lists",
    "reverses the words of a sentence",
    "converts degrees Celsius to Fahrenheit",
    "returns the n-th Fibonacci number",
    "flattens a nested list",
    "groups words by their first letter",
    "checks whether a number is prime",
    "computes the factorial of n without recursion",
    "finds the most common character in a string",
    "transposes a matrix given as a list of lists",
    "parses a line of comma-separated values",
    "rotates a list by k places",
    "validates a password by length and digits",
    "computes the median of a list",
    "encodes a string by run lengths",
)
STYLES = (
    "Add a short docstring.",
    "Use a loop, not a library.",
    "Show one example call.",
    "Explain it in one sentence afterwards.",
    "Add type hints.",
    "Handle an empty input.",
)
RUDE = (
    "Send me the report now.",
    "You are late again.",
    "I do not like this plan.",
    "Stop talking during the meeting.",
    "This room is a mess.",
    "Your idea will not work.",
    "Give me my money back.",
    "Nobody read your message.",
    "Fix the heating today.",
    "I have no time for you.",
    "Do not touch my desk.",
    "The food was cold.",
)
TONES = "politely|as a formal letter would|in simpler words|more cheerfully|in fewer words".split(
    "|"
)
PAIRS = (
    ("cats", "dogs"),
    ("trains", "planes"),
    ("tea", "coffee"),
    ("renting a flat", "buying a house"),
    ("books", "films"),
    ("summer", "winter"),
    ("solar power", "wind power"),
    ("a laptop", "a desktop computer"),
    ("city life", "country life"),
    ("running", "swimming"),
    ("paper notes", "notes on a phone"),
    ("Python", "C"),
    ("working at home", "working in an office"),
    ("cooking at home", "eating out"),
    ("lists", "tuples in Python"),
)
DISHES = (
    "vegetable soup",
    "pancakes",
    "a potato salad",
    "fried rice",
    "an apple cake",
    "lentil stew",
    "tomato sauce",
    "scrambled eggs",
    "hummus",
    "banana bread",
    "a bean burrito",
    "roast carrots",
    "rice pudding",
    "a simple pizza dough",
    "mushroom risotto",
)


def arithmetic(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    food, price, many = rng.choice(FOODS), rng.randint(2, 9), rng.randint(3, 20)
    return rng.choice(
        (
            f"{who} buys {many} {food} at {price} dollars each and pays with 200 dollars. "
            "How much change is there? Explain step by step.",
            f"{who} has {many} {food} and gives {rng.randint(1, many - 1)} of them to {other}. "
            f"Then {who} buys {price} more. How many {food} does {who} have now?",
            f"What is {rng.randint(12, 99)} times {price}? Show your work.",
            f"A box holds {price} {food}. How many boxes are needed for {many * price + 3} {food}?",
        )
    )


def python(rng: Random) -> str:
    asked = rng.choice(PYTHON)
    return f"Write a Python function that {asked}. {rng.choice(STYLES)}"


def explanation(rng: Random) -> str:
    topic, listener = rng.choice(TOPICS), rng.choice(LISTENERS)
    return rng.choice(
        (
            f"Explain {topic} to {listener}.",
            f"What is {topic}, and why does it matter? Answer for {listener}.",
            f"Describe {topic} in a short paragraph that {listener} understands.",
        )
    )


def rewriting(rng: Random) -> str:
    return f'Rewrite this sentence {rng.choice(TONES)}: "{rng.choice(RUDE)}"' + rng.choice(
        ("", " Give two versions.", f" It is meant for {rng.choice(NAMES)}, a {rng.choice(JOBS)}.")
    )


def passage(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    thing, animal = rng.choice(THINGS), rng.choice(ANIMALS)
    return (
        f"{who}, a {rng.choice(JOBS)}, found an old {thing} in {rng.choice(PLACES)} on a day in "
        f"{rng.choice(('March', 'June', 'October', 'December'))}. It belonged to {other}, who had "
        f"lost it {rng.randint(2, 30)} years before. {who} felt {rng.choice(FEELINGS)} and brought "
        f"it back the same evening. {other} was so {rng.choice(FEELINGS)} that they named their "
        f"new {animal} after the {rng.choice(JOBS)} next door instead."
    )


def summary(rng: Random) -> str:
    asked = rng.choice(
        ("Summarise the text in one sentence.", "Give a headline for this text.", "Sum this up.")
    )
    return f"{asked}\n\n{passage(rng)}"


def reading(rng: Random) -> str:
    asked = rng.choice(
        (
            "Who found the thing, and where?",
            "How long was it lost?",
            "How did the people feel?",
            "What happened in the end?",
        )
    )
    return f"Read the text and answer the question.\n\n{passage(rng)}\n\nQuestion: {asked}"


def extraction(rng: Random) -> str:
    keys = rng.choice(("name, job, place", "finder, owner, years_lost", "thing, month, animal"))
    return f"Extract {keys} from the text as JSON.\n\n{passage(rng)}"


def tips(rng: Random) -> str:
    return (
        f"Give {rng.randint(3, 7)} tips for {rng.choice(GOALS)}, as a numbered list, for a "
        f"{rng.choice(JOBS)} who is {rng.choice(FEELINGS)}."
    )


def letter(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    reason = rng.choice(
        (
            f"ask for an appointment on the {rng.randint(2, 28)}th",
            f"thank for the {rng.choice(THINGS)}",
            f"apologise for missing the visit to {rng.choice(PLACES)}",
            f"invite to a dinner with {rng.choice(FOODS)}",
            f"ask for advice about {rng.choice(GOALS)}",
        )
    )
    return f"Write a short e-mail from {who} to {other}, a {rng.choice(JOBS)}, to {reason}."


def story(rng: Random) -> str:
    return (
        f"Tell a short story about a {rng.choice(FEELINGS)} {rng.choice(ANIMALS)} and a "
        f"{rng.choice(THINGS)} in {rng.choice(PLACES)}."
    )


def facts(rng: Random) -> str:
    country, topic = rng.choice(COUNTRIES), rng.choice(TOPICS)
    return rng.choice(
        (
            f"What is the capital of {country}, and what is it known for?",
            f"Name three foods that are common in {country}.",
            f"Which languages are spoken in {country}?",
            f"What is the climate of {country} like in {rng.choice(('winter', 'summer'))}?",
            f"Name {rng.randint(2, 5)} facts about {topic}.",
            f"What are common mistakes about {topic}?",
        )
    )


def dialogue(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    return (
        f"Write a short dialogue between {who}, a {rng.choice(JOBS)}, and {other}, a "
        f"{rng.choice(JOBS)}, about {rng.choice([*TOPICS, *GOALS])}."
    )


def comparison(rng: Random) -> str:
    a, b = rng.choice(PAIRS)
    return rng.choice(
        (
            f"Compare {a} with {b} for a {rng.choice(JOBS)}.",
            f"What speaks for {a}, and what for {b}? Answer with a list.",
            f"{rng.choice(NAMES)} cannot choose between {a} and {b}. Help in a few sentences.",
        )
    )


def recipe(rng: Random) -> str:
    return rng.choice(
        (
            f"How do I make {rng.choice(DISHES)} for {rng.randint(2, 8)} people?",
            f"Write a recipe for {rng.choice(DISHES)} with {rng.choice(FOODS)}, in numbered steps.",
        )
    )


TRAINED: tuple[Callable[[Random], str], ...] = (
    *(arithmetic, python, explanation, rewriting, summary, reading, extraction, tips, letter),
    *(story, facts, dialogue),
)
HELD_OUT: tuple[Callable[[Random], str], ...] = (comparison, recipe)


def prompts(per_kind: int, seed: int) -> list[dict[str, str]]:
    """So many of each kind, all different, the kinds in turn: the first part of them is of all."""
    drawn = []
    for kind in (*TRAINED, *HELD_OUT):
        rng, found = Random(f"{seed} {kind.__name__}"), dict[str, None]()
        for _ in range(100 * per_kind):
            if len(found) < per_kind:
                found[kind(rng)] = None
        if len(found) < per_kind:
            raise ValueError(f"{kind.__name__}: {len(found)} different prompts, not {per_kind}")
        drawn.append([{"family": kind.__name__, "prompt": prompt} for prompt in found])
    return [prompt for turn in zip(*drawn, strict=True) for prompt in turn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--per-kind", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        lines = [json.dumps(prompt) + "\n" for prompt in prompts(args.per_kind, args.seed)]
    except ValueError as error:
        parser.error(str(error))
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
