"""Makes this fixture with Hugging Face transformers: a random SigLIP + Qwen2 model in the layout of
LlavaForConditionalGeneration, and what it computes.

    pip install torch transformers pillow && python make.py
"""

import json
import pathlib

import numpy
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
TEXTS = ["Is there a nodule in the left lung?", "Yes, a small nodule.", "The heart is normal.", "You are a helpful assistant.",
         "system user assistant"]
CONVERSATIONS = [
    ["<image>\nIs there a nodule?", "No, the lung is normal."],
    ["<image>\nWhat is shown?", "A small nodule.", "Where?", "In the left lung."],
    ["Is the heart normal?", "Yes."],
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=296, initial_alphabet=alphabet, show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    fast.chat_template = TEMPLATE
    return fast


def main():
    torch.manual_seed(11)
    fast = tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=6,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=len(fast), hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False,
        ),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1:
                parameter.add_(0.5)
    images = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    model.save_pretrained(HERE)
    fast.save_pretrained(HERE)
    images.save_pretrained(HERE)

    picture = numpy.random.default_rng(5).integers(0, 256, (31, 45, 3), dtype=numpy.uint8)
    Image.fromarray(picture).save(HERE / "image.png")
    features = (24 // 6) ** 2
    rows, tensors = [], {}
    for i, turns in enumerate(CONVERSATIONS):
        messages = [{"role": "assistant" if k % 2 else "user", "content": t} for k, t in enumerate(turns)]
        text = fast.apply_chat_template(messages, tokenize=False)
        ids = fast(text.replace("<image>", "<image>" * features), add_special_tokens=False).input_ids
        labels = [-100] * len(ids)
        before = ""
        for k, t in enumerate(turns):
            head = before + f"<|im_start|>{messages[k]['role']}\n"
            before = head + t + "<|im_end|>\n"
            if k % 2:
                start = len(fast(head.replace("<image>", "<image>" * features), add_special_tokens=False).input_ids)
                end = start + len(fast(t + "<|im_end|>", add_special_tokens=False).input_ids)
                labels[start:end] = ids[start:end]
        has_image = "<image>" in text
        picture = Image.open(HERE / "image.png").convert("RGB")
        shown = images(picture, return_tensors="pt") if has_image else {}
        out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), output_hidden_states=True, **shown)
        prompt = text[: text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
        prompt = fast(prompt.replace("<image>", "<image>" * features), add_special_tokens=False).input_ids
        answer = model.generate(input_ids=torch.tensor([prompt]), **shown, max_new_tokens=8, do_sample=False)
        rows.append({
            "turns": turns, "image": "image.png" if has_image else None, "input_ids": ids, "labels": labels,
            "prompt": prompt, "generated": answer[0][len(prompt):].tolist(), "loss": out.loss.item(),
        })
        if i == 0:
            tensors["0.logits"] = out.logits[0]
        for k, state in enumerate(out.hidden_states):
            tensors[f"{i}.hidden.{k}"] = state[0]
        if has_image:
            pixels = shown["pixel_values"]
            tensors[f"{i}.pixels"] = pixels[0]
            tensors[f"{i}.vision"] = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][0]
            tensors[f"{i}.projected"] = model.model.get_image_features(pixels).pooler_output[0].reshape(features, -1)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, HERE / "states.safetensors")
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "cases.json").write_text(json.dumps({"made_by": made_by, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
