//! Judges every answer: `verdicts.jsonl`.
