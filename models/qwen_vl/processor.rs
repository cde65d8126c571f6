//! Host side of Qwen-VL: images, prompts, label masks.
