"""The peer of benches/llm.rs: the same job with asyncio and aiohttp.

N chat completions, so many in flight, each reply appended to a JSONL file. No ledger, no budget, no retries: what a
short script of a laboratory does.

    python asyncio_client.py http://127.0.0.1:8080/v1 20000 512
"""

import asyncio
import json
import resource
import sys
import tempfile
import time

import aiohttp


def body(row: int) -> dict:
    text = f"Row {row}. " + "Is there a nodule in the left lung? " * 14
    return {"model": "mock", "messages": [{"role": "user", "content": text}], "max_tokens": 300}


async def job(base_url: str, count: int, in_flight: int) -> None:
    rows = iter(range(count))
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as out:
        connector = aiohttp.TCPConnector(limit=in_flight)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def worker() -> None:
                for row in rows:
                    async with session.post(f"{base_url}/chat/completions", json=body(row)) as response:
                        response.raise_for_status()
                        out.write(json.dumps({"row": row, "reply": await response.json()}) + "\n")
                        out.flush()

            await asyncio.gather(*(worker() for _ in range(in_flight)))


if __name__ == "__main__":
    url, n, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    started = time.perf_counter()
    asyncio.run(job(url, n, width))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"asyncio+aiohttp: {n} requests, {width} in flight, {seconds:.2f} s, {n / seconds:.0f}/s, {peak:.0f} MiB")
