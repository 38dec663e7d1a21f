"""The time to the first token of an honest client while others attack the server, beside its time alone.

    python benchmarks/serve_load.py [--requests 1000] [--connections 300] [--one-address]

Starts `mla-moe serve` with a tiny random model and a BPE tokenizer trained on this package. An honest client streams
one completion after another, first alone, then while attackers send `--requests` from `--connections` connections: a
third are cancelled, a tenth are hostile (`HOSTILE`), the others ask for one to four choices, again if they are refused
with status 429. The attackers have another API key than the honest client and, unless `--one-address`, another
loopback address. Exits with status 1 unless the median under attack is below 3 times the one alone, every honest
answer is the one that the server gives alone afterwards, no attacker gets an internal error or no answer at all, and
no ordinary request is cut off or refused with status 503.
"""

import argparse
import asyncio
import dataclasses
import http.client
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

HONEST = {"Content-Type": "application/json", "Authorization": "Bearer honest"}
MAX_RATIO = 3
PATIENCE = 120.0
"""Seconds after which an attacker's request counts as hanging."""
RETRY = 0.5
"""Seconds until an attacker sends a request again that was refused with status 429."""


def post(body: Any, length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(content) if length is None else length
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Authorization: Bearer attacker\r\nContent-Length: {length}\r\n\r\n".encode() + content


HOSTILE = {
    "a text of 4 MB": post({"prompt": "7" * 4_100_000}),
    "two million tokens, 64 times": post({"prompt": [7] * 1_300_000, "n": 64}),
    "a million prompts": post({"prompt": ["a"] * 800_000, "n": 64}),
    "nested lists": post(b'{"prompt":' + b"[" * 4_000_000),
    "a value of 4 MB": post({"prompt": "a", "temperature": "7" * 4_000_000}),
    "half a body": post(b'{"prompt": "', 4_000_000),
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: loc",
    "nothing": b"",
    "no HTTP": os.urandom(1000),
    "64 long choices": post({"prompt": "def ", "n": 64, "max_tokens": 500, "stream": True}),
}

SILENT = {"half a body", "half a head", "nothing", "no HTTP"}
"""What ends by a timeout of the server, after the load is over."""


def ask(port: int, prompt: str) -> tuple[float, str]:
    """Seconds to the first text of a stream, and the whole text."""
    body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, first, parts = time.perf_counter(), 0.0, []
    connection.request("POST", "/v1/completions", json.dumps(body), HONEST)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the honest client got {response.status}: {response.read()!r}")
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            event = json.loads(line.removeprefix(b"data: "))
            parts += [event["choices"][0]["text"] if "choices" in event else f"ERROR {event}"]
    connection.close()
    return first, "".join(parts)


async def send(port: int, content: bytes, source: str, stop_after: float | None) -> str:
    """The status of an answer that was read to its end, or how else the connection ended."""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    except OSError as error:
        return f"no connection: {error}"
    try:
        async with asyncio.timeout(PATIENCE if stop_after is None else stop_after):
            writer.write(content)
            await writer.drain()
            answer = await reader.read(-1)
        return answer[9:12].decode(errors="replace") or "closed"
    except TimeoutError:
        return "hangs" if stop_after is None else "cancelled"
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


def requests(count: int, seed: int) -> list[tuple[str, bytes, float | None]]:
    """Kind, bytes, and the time after which the client goes away, in random order."""
    rng, kinds, made = random.Random(seed), [*HOSTILE], []
    for i in range(count):
        if i < count // 10:
            made.append((kinds[i % len(kinds)], HOSTILE[kinds[i % len(kinds)]], None))
            continue
        prompt, n = rng.randbytes(rng.randint(5, 60)).hex(), rng.choice([1, 1, 1, 1, 2, 4])
        body = {"prompt": prompt, "max_tokens": rng.randint(1, 100), "n": n, "stream": rng.random() < 0.5}
        made.append(("ordinary", post(body), rng.uniform(0, 2) if i < count // 10 + count // 3 else None))
    rng.shuffle(made)
    return made


def attack(port: int, count: int, connections: int, source: str, results: Any, is_over: Any) -> None:
    """Send `count` requests from so many connections, and put how often each kind ended how into `results`. The event
    `is_over` is set when only `SILENT` ones are left."""

    async def attack_all() -> Counter[tuple[str, str]]:
        made = requests(count, seed=1)
        remaining, ends = iter(enumerate(made)), Counter[tuple[str, str]]()
        loud = {i for i, (kind, *_) in enumerate(made) if kind not in SILENT}

        async def one_connection() -> None:
            for i, (kind, content, stop_after) in remaining:
                start = time.monotonic()
                while (end := await send(port, content, source, stop_after)) == "429" and kind == "ordinary":
                    if time.monotonic() - start > PATIENCE:
                        break
                    await asyncio.sleep(RETRY)
                ends[kind, end] += 1
                loud.discard(i)
                if not loud:
                    is_over.set()

        await asyncio.gather(*(one_connection() for _ in range(connections)))
        return ends

    results.put(asyncio.run(attack_all()))


def warm_up(port: int) -> None:
    """Compile the programs for prompts of every length and number."""
    for length in (8, 50, 200, 600):
        for prompts in ([b"a"], [b"b", b"c", b"d"] * 3):
            texts = [(prompt * length).decode() + str(i) for i, prompt in enumerate(prompts)]
            body = json.dumps({"prompt": texts, "max_tokens": 20}).encode()
            url = f"http://127.0.0.1:{port}/v1/completions"
            request = urllib.request.Request(url, body, HONEST)
            with urllib.request.urlopen(request, timeout=600) as response:
                response.read()


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    from flax import nnx

    import mla_moe
    from mla_moe import Transformer, preset, save_pretrained
    from mla_moe.text.tokenizer import train_bpe

    # Larger weights than at the start of training: the most likely token is clearly the most likely one.
    cfg = dataclasses.replace(preset("tiny"), initializer_range=0.2, num_nextn_predict_layers=0)
    save_pretrained(Transformer(cfg, rngs=nnx.Rngs(0)), folder / "model")
    documents = [path.read_text() for path in sorted(Path(mla_moe.__file__).parent.rglob("*.py"))]
    train_bpe(documents, cfg.vocab_size, folder / "model" / "tokenizer.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MLA_MOE_API_KEY": "honest attacker"}
    command = [sys.executable, "-c", "from mla_moe.cli import main; raise SystemExit(main())", "serve"]
    server = subprocess.Popen(
        [*command, str(folder / "model"), "--port", str(port), "--max-model-len", "1024"], env=environment
    )
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return server, port
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.2)


def memory_mb(server: subprocess.Popen[bytes]) -> int:
    """Most memory that the server has had."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) >> 10 if match else 0


def main() -> int:
    from mla_moe.inference.http_limits import max_connections

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=300)
    parser.add_argument("--alone", type=int, default=20, help="honest requests before the attack")
    parser.add_argument("--one-address", action="store_true", help="attackers differ by their key alone")
    args = parser.parse_args()
    most = max_connections() // 2  # of one address; a refused ordinary request would count as bad
    if args.connections >= most:
        parser.error(f"--connections must be below {most}, which the server allows for one address (ulimit -n)")
    with tempfile.TemporaryDirectory() as folder:
        server, port = start_server(Path(folder))
        try:
            return measure(args, server, port)
        finally:
            server.terminate()
            server.wait()


def measure(args: argparse.Namespace, server: subprocess.Popen[bytes], port: int) -> int:
    warm_up(port)
    prompts = (f"{i} honest words " * 20 for i in range(1_000_000))
    alone = [ask(port, next(prompts))[0] for _ in range(args.alone)]
    before = memory_mb(server)
    context = multiprocessing.get_context("spawn")
    results, is_over = context.Queue(), context.Event()
    load = args.requests, args.connections, "127.0.0.1" if args.one_address else "127.0.0.2"
    attackers = context.Process(target=attack, args=(port, *load, results, is_over))
    attackers.start()
    time.sleep(2)  # they are at work
    attacked: dict[str, tuple[float, str]] = {}
    while not is_over.is_set() and attackers.is_alive():
        prompt = next(prompts)
        attacked[prompt] = ask(port, prompt)
    ends = results.get(timeout=2 * PATIENCE if attackers.is_alive() else 1)
    attackers.join()
    growth = memory_mb(server) - before
    wrong = [prompt for prompt, (_, text) in attacked.items() if ask(port, prompt)[1] != text]
    times = [seconds for seconds, _ in attacked.values()]
    ratio = statistics.median(times) / statistics.median(alone)

    print(f"{'time to first token, s':28}{'requests':>9}{'median':>8}{'max':>8}")
    for name, row in (("alone", alone), ("under attack", times)):
        print(f"{name:28}{len(row):9}{statistics.median(row):8.3f}{max(row):8.3f}")
    print(f"ratio of medians {ratio:.2f}; wrong honest answers {len(wrong)}; memory grew by {growth} MB")
    for (kind, end), count in sorted(ends.items()):
        print(f"  {count:5} {kind}: {end}")
    bad = [end for _, end in ends if end in ("500", "hangs") or end.startswith("no connection")]
    bad += [end for kind, end in ends if kind == "ordinary" and end in ("closed", "503")]
    return int(ratio >= MAX_RATIO or bool(wrong) or bool(bad))


if __name__ == "__main__":
    sys.exit(main())
