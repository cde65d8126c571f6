//! Source rows to instruction rows: `samples.jsonl` and rendered images.
