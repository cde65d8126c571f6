"""Makes quantized.safetensors with bitsandbytes on the CPU: a weight, and the values it has in NF4, in NF4 with double
quantisation, and in 8-bit blocks.

    pip install torch bitsandbytes safetensors && python make_quantized.py
"""

import pathlib

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

torch.manual_seed(1)
# Rows that are no multiple of a block, and blocks of very different sizes.
weight = torch.randn(61, 45) * 0.02 * torch.linspace(0.2, 3.0, 61)[:, None]
weight[3] = 0.0
out = {"weight": weight}
for name, double in [("nf4", False), ("nf4_double", True)]:
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    out[name] = functional.dequantize_4bit(packed, state).float()
# The published definition of symmetric 8-bit blocks: round(127 w / max |w|), ties to even.
flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
scale = flat.abs().amax(1, keepdim=True) / 127
codes = torch.where(scale > 0, (flat / scale).round(), torch.zeros_like(flat))
out["int8"] = (codes * scale).flatten()[: weight.numel()].reshape(weight.shape)
metadata = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
save_file({k: v.contiguous() for k, v in out.items()}, pathlib.Path(__file__).parent / "quantized.safetensors", metadata)
