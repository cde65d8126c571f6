"""Adapters handed over between peft and this program, and back.

    python benches/peers/peft_handover.py start DIR       # peft trains every variant of tests/golden/peft
    MEDTUNE_HANDOVER=DIR cargo test --release --test main parity::peft::adapters_are_handed_over -- --nocapture
    python benches/peers/peft_handover.py finish DIR      # peft continues, and compares logits at the hand-over

`pip install torch transformers peft safetensors`. At each hand-over the logits of the receiver must be those of the giver.
"""

import json
import pathlib
import sys

import peft
import torch
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/peft"
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402

STEPS = 5


def logits(model):
    return make.forward(model, *make.inputs()).logits[0, -make.SHOWN:, ::make.EVERY].detach().contiguous().clone()


def train(model, ratio):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=make.RATE, weight_decay=0.0)
    if ratio:
        optimizer = make.create_loraplus_optimizer(model, torch.optim.AdamW, lr=make.RATE, loraplus_lr_ratio=ratio)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = make.forward(model, *make.inputs()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(make.forward(model, *make.inputs()).loss.item())
    return losses


def start(root):
    for name, settings in make.VARIANTS.items():
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        settings = dict(settings)
        ratio = settings.pop("loraplus_lr_ratio", None)
        torch.manual_seed(11)
        model = peft.get_peft_model(make.base(), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
        losses = train(model, ratio)
        model.save_pretrained(place / "peft")
        save_file({"logits": logits(model)}, place / "peft.safetensors")
        (place / "case.json").write_text(json.dumps({"learning_rate": make.RATE, "loraplus_lr_ratio": ratio}))
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def finish(root):
    worst = 0.0
    count = 0
    for name in sorted(make.VARIANTS):
        place = root / name
        model = peft.PeftModel.from_pretrained(make.base(), place / "medtune", is_trainable=True)
        difference = (logits(model) - load_file(place / "medtune.safetensors")["logits"].reshape(make.SHOWN, -1)).abs().max()
        assert difference < 2e-4, (name, difference)
        losses = train(model, json.loads((place / "case.json").read_text())["loraplus_lr_ratio"])
        assert losses[-1] < losses[0], (name, losses)
        print(f"{name}: largest difference of a logit {difference:.1e}; loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        worst, count = max(worst, difference.item()), count + 1
    assert count
    print(f"{count} adapters taken back, largest difference of a logit {worst:.1e}")


if __name__ == "__main__":
    {"start": start, "finish": finish}[sys.argv[1]](pathlib.Path(sys.argv[2]))
