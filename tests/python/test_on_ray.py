"""Replicas behind Ray Serve, and batches on Ray Data: a cluster of two cores on this machine."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from python.command import COMMAND
from python.evaluating import PROMPTS, write
from python.serving import together, until

from sbd_engine import Engine, SbdError, SbdFileNotFoundError

pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.xdist_group("ray")

import ray  # noqa: E402
from ray import serve  # noqa: E402

from sbd_engine.on_ray import Replica, app  # noqa: E402
from sbd_engine.on_ray_data import Generate, Score, generate  # noqa: E402
from sbd_engine.server.settings import Settings  # noqa: E402

LONG = {"n": 6, "max_tokens": 500, "temperature": 1, "extra_body": {"ignore_eos": True}}
# Whatever the model is called.
ASKED = {"model": None, "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: None) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def deploy(url: str) -> Iterator[Callable[..., None]]:
    def start(**arguments: Any) -> None:
        serve.run(app({"replicas": 2, **arguments}), name="sbd")

    yield start
    serve.delete("sbd")


@pytest.fixture
def client(url: str) -> Any:
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def replicas() -> list[dict[str, Any]]:
    """Ray's names of the processes."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [each for each in actors if "sbd-engine" in each["name"]]


async def one(client: Any, **fields: Any) -> Any:
    return await client.completions.create(**{**ASKED, **fields})


async def streamed(client: Any, begun: Callable[[], None], **fields: Any) -> Counter[str]:
    """How its texts ended. Raises where it breaks off."""
    ends: Counter[str] = Counter()
    async for chunk in await one(client, stream=True, **fields):
        begun()
        ends.update(each.finish_reason for each in chunk.choices if each.finish_reason)
    return ends


def test_a_killed_replica_takes_its_own_requests_and_no_other(
    deploy: Callable[..., None], client: Any
) -> None:
    deploy(parallel=64)
    begun: set[int] = set()

    async def kill_in_the_middle() -> list[Any]:
        running = [
            *(streamed(client, partial(begun.add, n), **LONG) for n in range(8)),
            *(one(client, **LONG) for _ in range(4)),
        ]
        tasks = [asyncio.create_task(each) for each in running]
        while len(begun) < 8 and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in tasks)
        victim = replicas()[0]
        ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        return [*ends, *await asyncio.gather(*(one(client) for _ in range(16)))]

    (outcomes,) = together(kill_in_the_middle())
    streams, answers, after = outcomes[:8], outcomes[8:12], outcomes[12:]
    broken = [each for each in streams if isinstance(each, Exception)]
    assert 0 < len(broken) < 8
    # Of older clients httpx.RemoteProtocolError: "incomplete chunked read".
    assert all(
        isinstance(each, openai.APIConnectionError) or "incomplete" in str(each) for each in broken
    )
    assert all(each == Counter(length=LONG["n"]) for each in streams if each not in broken)
    failed = [each for each in answers if isinstance(each, Exception)]
    assert all(isinstance(each, openai.InternalServerError) for each in failed)
    assert all(len(each.choices) == LONG["n"] for each in answers if each not in failed)
    print(f"killed: {len(broken)} of 8 streams, {len(failed)} of 4 answers")
    assert {answer.choices[0].text for answer in after} == {"\n    return a + b"}
    until(lambda: len(replicas()) == 2, 30)  # another one in its place


def test_a_rolling_restart_loses_no_request(deploy: Callable[..., None], client: Any) -> None:
    deploy(alias="first")
    done, enough = Counter[str](), asyncio.Event()

    async def ask_on(name: str, ask: Callable[[], Any], ends: Counter[str]) -> None:
        while not enough.is_set():
            assert await ask() == ends
            done[name] += 1

    async def answer() -> Counter[str]:
        (choice,) = (await one(client)).choices
        assert choice.text == "\n    return a + b"
        return Counter([choice.finish_reason])

    async def stream() -> Counter[str]:
        return await streamed(client, lambda: None, **LONG)

    async def restart() -> set[str]:
        await more()
        await asyncio.to_thread(deploy, alias="second")  # until all is of the new one
        await more()
        enough.set()
        return {model.id for _ in range(8) for model in (await client.models.list()).data}

    async def more() -> None:
        before = Counter(done)
        while min((done - before)[name] for name in ("answers", "streams")) < 4:
            await asyncio.sleep(0.05)

    before = {each["name"] for each in replicas()}
    *_, names = together(
        *(ask_on("answers", answer, Counter(stop=1)) for _ in range(4)),
        *(ask_on("streams", stream, Counter(length=LONG["n"])) for _ in range(4)),
        restart(),
    )
    print(f"rolling restart: {dict(done)}, none lost")
    assert names == {"second"}
    assert before.isdisjoint(each["name"] for each in replicas())


def test_errors_and_bits_are_the_servers(deploy: Callable[..., None], client: Any) -> None:
    deploy(replicas=1, n_ctx="256", parallel="2", max_queue="1")
    sampled = {"temperature": 0.9, "seed": 7, "extra_body": {"ignore_eos": True}}
    with Engine(n_ctx=256) as engine:
        alone = engine.generate(ASKED["prompt"], max_tokens=24, temperature=0.9, seed=7,
                                ignore_eos=True)  # fmt: skip

    async def both() -> Any:
        answer = await one(client, **sampled)
        with pytest.raises(openai.BadRequestError) as refused:
            await one(client, prompt="a " * 400)
        crowd = await asyncio.gather(
            *(one(client, **{**LONG, "n": 1}) for _ in range(12)), return_exceptions=True
        )
        return answer.choices[0].text, refused.value.code, crowd

    ((text, code, crowd),) = together(both())
    assert text == alone.text
    assert code == "context_length_exceeded"
    full = [each for each in crowd if isinstance(each, Exception)]
    assert full and {type(each) for each in full} == {openai.RateLimitError}
    assert {each.code for each in full} == {"queue_full"}


def test_generate_by_two_workers_is_the_command_lines_file(
    cluster: None, model: Path, tmp_path: Path
) -> None:
    prompts, out, expected = (tmp_path / name for name in ("p.jsonl", "out.jsonl", "own.jsonl"))
    write(prompts, [{"prompt": f"{prompt} {n}"} for n in range(4) for prompt in PROMPTS])
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    flags = ["--max-tokens", "12", "--temperature", "0.8", "--seed", "3"]
    command = [COMMAND, "generate", model, "--prompts", prompts, *flags, "--out", expected]
    subprocess.run(command, check=True)

    count = 4 * len(PROMPTS)
    run = {"model": model, "workers": 2, "batch": 3, **options}
    assert generate(prompts, out, **run) == count
    assert sorted(out.read_text().splitlines()) == sorted(expected.read_text().splitlines())
    # Cut off in the middle of a line, it goes on; the command line's own file as well.
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:8], lines[8][:20]]))
    assert generate(prompts, out, **run) == count - 7
    assert sorted(out.read_text().splitlines()) == sorted(expected.read_text().splitlines())
    assert generate(prompts, shutil.copy(expected, tmp_path / "copy"), **run) == 0
    with pytest.raises(SbdError, match="temperature 0.8, this run has 0.9"):
        generate(prompts, out, **{**run, "temperature": 0.9})
    with pytest.raises(SbdFileNotFoundError, match=r"missing.bin: no such file"):
        generate(prompts, tmp_path / "none", **{**run, "model": tmp_path / "missing.bin"})
    assert not (tmp_path / "none").exists()


def test_batches_score_and_evaluate_as_the_library_does(
    cluster: None, model: Path, engine: Engine
) -> None:
    texts = [engine.generate(prompt, max_tokens=8).text for prompt in PROMPTS]
    rows = [
        {"prompt": prompt, "text": prompt, "answer": answer, "number": number}
        for number, (prompt, answer) in enumerate(zip(PROMPTS, [*texts[:-1], "no"], strict=True))
    ]
    data = ray.data.from_items(rows)
    call = {
        "batch_format": "pyarrow",
        "batch_size": 2,
        "compute": ray.data.ActorPoolStrategy(size=1),
    }
    scored = data.map_batches(Score, fn_constructor_args=(model,), **call).take_all()
    for row in scored:
        own = engine.score(row["text"])
        assert (list(row["tokens"]), json_list(row["logprobs"])) == (own.tokens, own.logprobs)
    asked = {"fn_constructor_args": (model,), "fn_constructor_kwargs": {"max_tokens": 8}}
    done = data.map_batches(Generate, **asked, **call).take_all()
    assert {row["number"]: row["text"] for row in done} == dict(enumerate(texts))
    assert sorted(row["number"] for row in done if not row["right"]) == [len(PROMPTS) - 1]


def json_list(values: Any) -> list[float | None]:
    return [None if each is None or each != each else float(each) for each in values]


def test_a_replica_is_healthy_while_forwards_succeed() -> None:
    replica = Replica(Settings(n_threads=1))
    for _ in range(2):
        asyncio.run(replica.check_health())
    replica.__del__()
    with pytest.raises(SbdError, match="closed"):
        asyncio.run(replica.check_health())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"modle": "x"}, "unknown argument 'modle': did you mean model?"),
        ({"n_ctx": "many"}, "`n_ctx`: Input should be a valid integer"),
        ({"parallel": 0}, "expected `parallel` >= 1, got 0"),
        ({"replicas": 2, "max_replicas": 1}, "expected `max_replicas` >= 2, got 1"),
        ({"api_key_file": "/missing"}, "/missing: no such file"),
        ({"kv_budget": "much"}, "expected `kv_budget` in bytes"),
    ],
)
def test_what_it_refuses(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SbdError) as refused:
        app(arguments)
    assert complaint in str(refused.value)
