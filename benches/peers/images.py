"""Decodes and resizes images with Pillow on one core, in turns with `benches/inputs.rs`.

    pip install pillow
    python benches/peers/images.py [DIR] [--rounds N] [--binary PATH]

Without `--binary` the benchmark is built and found by cargo; without a directory it makes its images up. A round is one
pass over all images by each side, one right after the other, the order alternating. Both sides tell the processor time
of their one thread. Printed are images per second of decoding with resizing, decoding, and resizing, medians with range,
and the ratio of each round.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from PIL import Image, __version__

SIDE = 336
ROOT = Path(__file__).resolve().parents[2]


def build():
    command = ["cargo", "bench", "--bench", "inputs", "--no-run", "--message-format=json"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in found if m.get("executable") and m["target"]["name"] == "inputs")


def decode(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def resize(image):
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def spread(values, digits):
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


parser = argparse.ArgumentParser()
parser.add_argument("directory", nargs="?")
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--binary")
arguments = parser.parse_args()

environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
if arguments.directory:
    environment["MEDTUNE_BENCH_IMAGES"] = os.path.abspath(arguments.directory)
binary = arguments.binary or build()
ours = subprocess.Popen(
    [binary, "--in-turns"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
directory = Path(ours.stdout.readline().rstrip("\n"))
paths = sorted(p for p in directory.iterdir() if p.suffix in (".jpg", ".jpeg", ".png"))
files = [p.read_bytes() for p in paths]
decoded = [decode(data) for data in files]
passes = {
    "decode_resize": lambda: [resize(decode(data)) and None for data in files],
    "decode": lambda: [decode(data) and None for data in files],
    "resize": lambda: [resize(image) and None for image in decoded],
}


def medtune(name):
    ours.stdin.write(name + "\n")
    ours.stdin.flush()
    return float(ours.stdout.readline())


def pillow(name):
    started = time.process_time()
    passes[name]()
    return time.process_time() - started


print(f"Pillow {__version__}, {len(files)} files of {sum(map(len, files)) / len(files) / 1e3:.0f} kB on average")
for name in passes:
    rates = {medtune: [], pillow: []}
    for turn in range(-1, arguments.rounds):
        for side in (medtune, pillow) if turn % 2 else (pillow, medtune):
            took = side(name)
            # The first round only warms up.
            if turn >= 0:
                rates[side].append(len(files) / took)
    ratios = [a / b for a, b in zip(rates[medtune], rates[pillow])]
    print(f"{name}: medtune {spread(rates[medtune], 0)}, Pillow {spread(rates[pillow], 0)} images/s, ratio {spread(ratios, 1)}")
