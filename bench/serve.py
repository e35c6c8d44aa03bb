"""What does a step of the server cost with many clients, and what does a shared prefix save?

One run: clients that ask at once, with prompts of some lengths, in tokens per second and time to the first token; then
questions about a document that was read once, against the same texts sent whole; then, of a server that holds prompts,
the time to the first token of a prompt whose beginning it has read, against one whose beginning is new.

    python bench/serve.py --model model.gguf --clients 1 4 8 16 --prompts 200 --generate 64
"""

import argparse
import asyncio
import contextlib
import json
import socket
import threading
import time
from statistics import median
from typing import Any

import httpx
import torch
import uvicorn
from common import save, table

from kvote import Library
from kvote.cli.load import load
from kvote.models import world
from kvote.serve.app import application
from kvote.serve.engine import Limits
from kvote.serve.prefixes import Prefixes
from kvote.serve.service import Service


@contextlib.contextmanager
def served(loaded: Any, method: str, library: Library | None = None) -> Any:
    """A service on a port of its own."""
    limits = Limits(rows=32, nbytes=2**33)
    kept = library and Prefixes(loaded.model, library, chunk=limits.chunk, shares=False)
    service = Service("model", loaded.model, loaded.tokenizer, method, limits, prefixes=kept)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(service), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield service, f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


async def one(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first text and to the end of a streamed answer."""
    begin, first = time.perf_counter(), 0.0
    async with client.stream("POST", path, json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and not first:
                # The first event of a chat tells the role alone.
                told = (json.loads(line[6:]).get("choices") or [{}])[0]
                if told.get("text") or told.get("delta", {}).get("content"):
                    first = time.perf_counter() - begin
    return first, time.perf_counter() - begin


async def many(url: str, bodies: list[dict[str, Any]], path: str = "/v1/completions") -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        begin = time.perf_counter()
        times = await asyncio.gather(*(one(client, path, body) for body in bodies))
        whole = time.perf_counter() - begin
    firsts = sorted(first for first, _ in times)
    tokens = sum(body["max_tokens"] for body in bodies)
    return {
        "tokens_per_second": tokens / whole,
        "first_median_s": median(firsts),
        "first_slowest_s": firsts[-1],
        "seconds": whole,
    }


def ids(service: Service, count: int, seed: int) -> list[int]:
    """Some text of the built-in language, in ``count`` of the model's tokens."""
    text = world.sample("needle", max(400, count), seed, 4).document
    made: list[int] = service.tokenizer(text, add_special_tokens=False).input_ids
    return (made * (1 + count // len(made)))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name, folder or GGUF file (default: the embedded model)")
    parser.add_argument("--method", default="dense")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[200])
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=3000)
    args = parser.parse_args()
    rows, loaded = [], load(args.model)
    with served(loaded, args.method) as (service, url):
        never = dict.fromkeys(map(str, service.engine.ends), -100)

        def body(prompt: list[int], tokens: int) -> dict[str, Any]:
            asked = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            return {**asked, "logit_bias": never}

        asyncio.run(many(url, [body(ids(service, 50, 0), 8)]))
        for prompt in args.prompts:
            for clients in args.clients:
                bodies = [body(ids(service, prompt, seed), args.generate) for seed in range(clients)]
                rows.append({"prompt": prompt, "clients": clients, **asyncio.run(many(url, bodies))})
        text = service.tokenizer.decode(ids(service, args.prefix, 99))
        made = httpx.post(f"{url}/v1/documents", json={"text": text, "kv_method": args.method}, timeout=None).json()
        question = service.tokenizer.decode(ids(service, 200, 7))
        chat = {"model": "model", "max_tokens": 2, "temperature": 0, "logit_bias": never}
        whole = {**chat, "messages": [{"role": "user", "content": f"{text}\n\n{question}"}], "kv_method": args.method}
        behind = {**chat, "messages": [{"role": "user", "content": question}], "document": made["id"]}
        firsts: dict[str, list[float]] = {"whole": [], "document": []}
        for _ in range(3):
            for name, asked in (("whole", whole), ("document", behind)):
                firsts[name].append(asyncio.run(many(url, [asked], "/v1/chat/completions"))["first_median_s"])
    held: dict[int, dict[str, list[float]]] = {}
    with served(loaded, args.method, Library()) as (service, url):
        asyncio.run(many(url, [body(ids(service, 50, 0), 8)]))
        for own in (200, 1000):
            held[own] = {"new": [], "held": []}
            for seed in range(3):
                begun = ids(service, args.prefix, 100 * own + seed)
                for name, ending in (("new", 7), ("held", 8)):
                    asked = body(begun + ids(service, own, ending), 2)
                    held[own][name].append(asyncio.run(many(url, [asked]))["first_median_s"])
    shared = {name: median(seconds) for name, seconds in firsts.items()}
    prefixes = [
        {"prefix": args.prefix, "own": own, **{name: median(each) for name, each in times.items()}}
        for own, times in held.items()
    ]
    print(
        table(
            ["prompt", "clients", "tokens/s", "of one client", "first token, median", "slowest"],
            [
                [
                    f"{row['prompt']:,}",
                    str(row["clients"]),
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['tokens_per_second'] / base(rows, row):.1f}x",
                    f"{row['first_median_s']:.2f} s",
                    f"{row['first_slowest_s']:.2f} s",
                ]
                for row in rows
            ],
        )
    )
    ratio = shared["whole"] / shared["document"]
    print(
        f"first token behind {made['tokens']:,} tokens: {shared['whole']:.2f} s sent whole, {shared['document']:.2f} s "
        f"as a document, {ratio:.1f}x"
    )
    for each in prefixes:
        print(
            f"first token of {each['own']:,} tokens behind {each['prefix']:,}: {each['new']:.2f} s new, "
            f"{each['held']:.2f} s where these were read for an earlier prompt, {each['new'] / each['held']:.1f}x"
        )
    save(
        "serve",
        {
            "threads": torch.get_num_threads(),
            "method": args.method,
            "rows": rows,
            "document": {"tokens": made["tokens"], **shared, "ratio": ratio},
            "prefixes": prefixes,
        },
    )


def base(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """Tokens per second with the fewest clients, of prompts of that length."""
    same = [other for other in rows if other["prompt"] == row["prompt"]]
    return float(min(same, key=lambda other: other["clients"])["tokens_per_second"])


if __name__ == "__main__":
    main()
