"""Decodes and resizes images with Pillow on one core, for `benches/inputs.rs`.

    pip install pillow
    python benches/peers/images.py DIR

Prints images per second of decoding with resizing, decoding, and resizing, medians of five rounds.
"""

import io
import statistics
import sys
import time
from pathlib import Path

from PIL import Image, __version__

FILES, SIDE = 64, 336

paths = sorted(p for p in Path(sys.argv[1]).iterdir() if p.suffix in (".jpg", ".jpeg", ".png"))[:FILES]
files = [p.read_bytes() for p in paths]
decode = lambda data: Image.open(io.BytesIO(data)).convert("RGB")
resize = lambda image: image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
decoded = [decode(data) for data in files]


def rate(name, each, inputs):
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for value in inputs:
            each(value)
        times.append(time.perf_counter() - started)
    print(f"{name}: {len(inputs) / statistics.median(times):.1f} images/s")


print(f"Pillow {__version__}, {len(files)} files")
rate("decode_resize", lambda data: resize(decode(data)), files)
rate("decode", decode, files)
rate("resize", resize, decoded)
