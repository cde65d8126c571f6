"""Runs `benches/train_step.rs` and `benches/peers/train_step.py` in turns and prints the ratios.

    pip install torch transformers peft
    python benches/peers/train_step_pairs.py [--pairs N] [--steps N] [--binary PATH]

Without `--binary` the benchmark is built and found by cargo. Each run is told with how busy the processor was with
anything else and how much of it the host took away (`/proc/stat`), and each ratio is that of two runs that followed one
another; the order within a pair alternates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


def build():
    command = ["cargo", "bench", "--bench", "train_step", "--no-run", "--message-format=json"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in found if m.get("executable") and m["target"]["name"] == "train_step")


def processor():
    """Seconds of all cores together: all, busy, stolen by the host."""
    fields = [int(x) / TICKS for x in open("/proc/stat").readline().split()[1:9]]
    user, nice, system, idle, wait, interrupt, soft, steal = fields
    return sum(fields), user + nice + system + interrupt + soft, steal


def run(command):
    before, own = processor(), os.times()
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after, end = processor(), os.times()
    whole = after[0] - before[0]
    used = end.children_user + end.children_system - own.children_user - own.children_system
    result = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
    result["others_percent"] = round(100 * max(0, after[1] - before[1] - used) / whole, 1)
    result["stolen_percent"] = round(100 * (after[2] - before[2]) / whole, 1)
    return result


def spread(name, values, better):
    print(f"{name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}); {better} is better")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--generate", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary")
    arguments = parser.parse_args()
    binary = arguments.binary or build()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([binary, "--export", folder], check=True)
        tail = [f"--{n}={getattr(arguments, n)}" for n in ("steps", "generate", "threads")]
        ours = [binary, "--model", f"{folder}/base", *[x for t in tail for x in t.split("=")]]
        theirs = [sys.executable, str(ROOT / "benches/peers/train_step.py"), folder, *tail]
        for index in range(arguments.pairs):
            order = [ours, theirs] if index % 2 == 0 else [theirs, ours]
            results = [run(command) for command in order]
            pair = results if index % 2 == 0 else results[::-1]
            pairs.append(pair)
            for result in results:
                print(json.dumps(result), flush=True)
    ratio = lambda field: [ours[field] / theirs[field] for ours, theirs in pairs]
    spread("step time, medtune / PyTorch", ratio("step_ms"), "lower")
    spread("peak memory, medtune / PyTorch", ratio("peak_memory_bytes"), "lower")
    spread("generation tokens/s, medtune / PyTorch", ratio("generated_tokens_per_second"), "higher")
    first, last = [max(abs(o[f] / t[f] - 1) for o, t in pairs) for f in ("loss_first", "loss_last")]
    print(f"losses differ by {first:.1e} at the first step and {last:.1e} at the last, relative")


if __name__ == "__main__":
    main()
