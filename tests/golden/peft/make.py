"""Makes this fixture with Hugging Face's peft: adapters of every kind on the language model and projector of the LLaVA-Med
fixture, with what they compute, their gradients, one optimizer step, and the merged model.

    pip install torch transformers peft safetensors && python make.py

Each folder is one variant: adapter_config.json and adapter_model.safetensors as peft wrote them, case.json (what the
training was), values.safetensors: logits.* of the last positions, grad.* and stepped.* under peft's names.
"""

import json
import pathlib
import shutil

import peft
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
BASE = HERE.parent / "llava_med/checkpoint"
SHOWN, EVERY = 3, 4  # last positions whose logits are kept, of every fourth token
PATCHES = 3
RATE = 1e-2

QV = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
LAST = {**QV, "layers_to_transform": [2]}
PROJECTOR = r"model\.mm_projector\.[02]|model\.layers\.1\.mlp\.down_proj"
VARIANTS = {
    "lora": {**QV, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "rslora": {**LAST, "use_rslora": True, "r": 3},
    "patterns": {**QV, "layers_to_transform": [0, 2], "layers_pattern": "layers", "rank_pattern": {"v_proj": 1},
                 "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 3}},
    "dora": {**QV, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [0, 1], "use_dora": True},
    "dora_rslora": {**LAST, "use_dora": True, "use_rslora": True},
    "bias_all": {**QV, "target_modules": PROJECTOR, "bias": "all"},
    "bias_lora_only": {**QV, "target_modules": PROJECTOR, "bias": "lora_only"},
    "modules_to_save": {**LAST, "modules_to_save": ["norm", "input_layernorm"]},
    "pissa": {**LAST, "init_lora_weights": "pissa"},
    "olora": {**LAST, "target_modules": ["o_proj", "v_proj"], "init_lora_weights": "olora"},
    "pissa_dora": {**LAST, "init_lora_weights": "pissa", "use_dora": True},
    "loraplus": {**LAST, "loraplus_lr_ratio": 16.0},
}


def base():
    """The fixture's language model in f32, with its projector; image features take the first positions."""
    config = transformers.MistralConfig.from_dict({
        k: v for k, v in json.loads((BASE / "config.json").read_text()).items() if not k.startswith(("mm_", "model_type"))
    })
    config._attn_implementation = "eager"
    model = transformers.MistralForCausalLM(config).float().eval()
    model.model.mm_projector = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    weights = {}
    for file in sorted(BASE.glob("*.safetensors")):
        weights |= {k: v.float() for k, v in load_file(file).items()}
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not missing, missing
    return model


def inputs():
    ids = torch.tensor([[(7 * i + 3) % 500 for i in range(11)]])
    labels = ids.clone()
    labels[:, : PATCHES + 2] = -100
    features = torch.sin(torch.arange(PATCHES * 48).reshape(1, PATCHES, 48) * 0.37)
    return ids, labels, features


def forward(model, ids, labels, features):
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    embedded = inner.model.embed_tokens(ids)
    embedded = torch.cat([inner.model.mm_projector(features), embedded[:, PATCHES:]], 1)
    return model(inputs_embeds=embedded, labels=labels)


def adapter_tensors(model):
    return peft.get_peft_model_state_dict(model)


def perturb(model):
    """Trained adapters are nowhere zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)


def under_peft_names(model, value):
    """`value` of every trained parameter, under the names that peft saves."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.replace(".default", "").replace(".modules_to_save", "")
            name = name.removesuffix(".weight") if "magnitude" in name else name
            found[name] = value(p).detach().contiguous().clone()
    return found


def make(name, settings):
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    ratio = settings.pop("loraplus_lr_ratio", None)
    torch.manual_seed(3)
    model = peft.get_peft_model(base(), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    batch = inputs()
    before = forward(base(), *batch).logits
    start = forward(model, *batch).logits
    assert (before - start).abs().max() < 2e-4, name
    trained = [p for p in model.parameters() if p.requires_grad]
    perturb(model)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    written = load_file(out / "adapter_model.safetensors")
    names = under_peft_names(model, lambda p: p)
    assert set(names) == set(written), name
    result = forward(model, *batch)
    result.loss.backward()
    values = {"logits.adapted": result.logits[0, -SHOWN:, ::EVERY]}
    values |= {f"grad.{k}": v for k, v in under_peft_names(model, lambda p: p.grad).items()}
    if ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio)
    else:
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    optimizer.step()
    values |= {f"stepped.{k}": v for k, v in under_peft_names(model, lambda p: p).items()}
    values["logits.stepped"] = forward(model, *batch).logits[0, -SHOWN:, ::EVERY]
    values["logits.merged"] = forward(model.merge_and_unload(), *batch).logits[0, -SHOWN:, ::EVERY]
    save_file({k: v.detach().contiguous().clone() for k, v in values.items()}, out / "values.safetensors")
    case = {"loss": result.loss.item(), "learning_rate": RATE, "loraplus_lr_ratio": ratio, "settings": settings}
    (out / "case.json").write_text(json.dumps(case, indent=1) + "\n")


def weighted():
    """Two adapters at once, added by peft with `cat`."""
    batch = inputs()
    model = peft.PeftModel.from_pretrained(base(), HERE / "lora", adapter_name="one")
    model.load_adapter(HERE / "rslora", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    logits = forward(model, *batch).logits[0, -SHOWN:, ::EVERY]
    save_file({"logits.sum": logits.detach().contiguous().clone()}, HERE / "weighted.safetensors")
    (HERE / "weighted.json").write_text(json.dumps({"adapters": {"lora": 0.5, "rslora": 2.0}}) + "\n")


def main():
    torch.set_num_threads(1)
    for name, settings in VARIANTS.items():
        make(name, dict(settings))
    weighted()
    ids, labels, features = inputs()
    for file in HERE.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    made_by = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "inputs.json").write_text(json.dumps({
        "made_by": made_by, "input_ids": ids[0].tolist(), "labels": labels[0].tolist(), "patches": PATCHES,
        "features": features.flatten().tolist(), "shown": SHOWN, "every": EVERY,
    }) + "\n")


if __name__ == "__main__":
    main()
