"""The step of `benches/train_step.rs` in PyTorch, transformers and peft, from the same weights.

    pip install torch transformers peft
    cargo bench --bench train_step -- --export DIR
    python benches/peers/train_step.py DIR [--steps N] [--generate N] [--threads N]

Prints one line of JSON with the fields of `benches/train_step.rs`, and the memory that was taken before the model was
made (interpreter and libraries).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging

ROWS, LENGTH, ANSWERS, PROMPT, NEW_TOKENS = 4, 256, 8, 64, 64


def peak_memory():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def rows(count, length, start, vocab):
    token = lambda i: ((((i + 1) * 2654435761) & 0xFFFFFFFF) >> 16) % vocab
    return torch.tensor([[token(start + r * length + i) for i in range(length)] for r in range(count)])


def load(folder):
    """The base model under peft, its adapter trainable; the parts of a vision model are not read."""
    keys = json.loads((folder / "base" / "config.json").read_text())
    names = MistralConfig().to_dict()
    config = MistralConfig(**{k: v for k, v in keys.items() if k in names and k not in ("model_type", "architectures")})
    config.torch_dtype = None
    model = MistralForCausalLM(config).float()
    weights = {}
    for file in sorted((folder / "base").glob("*.safetensors")):
        weights |= load_file(file)
    missing, unused = model.load_state_dict(weights, strict=False)
    assert not missing and all("vision" in n or "mm_projector" in n for n in unused), (missing, unused)
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--generate", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    before = peak_memory()
    model = load(arguments.folder)
    vocab = model.config.vocab_size
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    times, losses = [], []
    for index in range(arguments.steps + 1):
        ids = rows(ROWS, LENGTH, index % 4 * ROWS * LENGTH, vocab)
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append((time.perf_counter() - started) * 1e3)
    peak = peak_memory()
    first = times.pop(0)
    model.eval()
    answered = []
    for _ in range(arguments.generate):
        prompts = rows(ANSWERS, PROMPT, 0, vocab)
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0)
        answered.append((out.shape[1] - PROMPT) * ANSWERS / (time.perf_counter() - started))
    median = statistics.median(times)
    print(json.dumps({
        "program": f"torch {torch.__version__}",
        "tokens_per_second": ROWS * LENGTH / median * 1e3,
        "step_ms": median,
        "step_ms_all": times,
        "first_step_ms": first,
        "peak_memory_bytes": peak,
        "libraries_memory_bytes": before,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "generated_tokens_per_second": statistics.median(answered) if answered else None,
    }))


if __name__ == "__main__":
    main()
