//! Every row of `samples.jsonl` ends in `kept.jsonl` or, with a reason code, in `rejected.jsonl`.
