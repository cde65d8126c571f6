"""Times the Python originals of medtune's text metrics, for `benches/metrics.rs`.

    pip install nltk rouge_score bert_score
    python benches/peers/metrics.py [text|encoder] [SECONDS] [PAIRS.jsonl]

Prints pairs per second of METEOR, ROUGE and BLEU and tokens per second of the encoder, one line each: by the clock, so
that threads count for what they are worth, and (in brackets) by processor time. nltk's WordNet
corpus is a download; METEOR here reads synonyms from the table that medtune embeds (`wordnet`, a dictionary lookup where
nltk parses its data files), which is faster than the original, so the ratio is a lower bound. Needs `zstd` on the path.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.meteor_score import single_meteor_score
from rouge_score import rouge_scorer

ROOT = Path(__file__).resolve().parents[2]
RULES = {
    "n": [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}


def table(name):
    path = ROOT / "src/metric/wordnet" / name
    return subprocess.run(["zstd", "-dc", str(path)], check=True, capture_output=True, text=True).stdout.splitlines()


class Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


class Synset:
    def __init__(self, names):
        self._lemmas = [Lemma(n) for n in names]

    def lemmas(self):
        return self._lemmas


class WordNet:
    """As much of nltk's corpus reader as METEOR calls: all synonyms of a form as one synset."""

    def __init__(self):
        self.entries = {p: {} for p in RULES}
        self.exceptions = {p: {} for p in RULES}
        for line in table("synonyms.tsv.zst"):
            lemma, *fields = line.split("\t")
            for field in fields:
                tag, _, names = field.partition(":")
                own = [lemma] if tag.islower() and "_" not in lemma else []
                self.entries[tag.lower()][lemma] = Synset(own + [n for n in names.split(",") if n])
        for line in table("exceptions.tsv.zst"):
            tag, form, bases = line.split("\t")
            self.exceptions[tag][form] = bases.split(",")

    def synsets(self, word):
        word, found = word.lower(), []
        for part, rules in RULES.items():
            bases = self.exceptions[part].get(word)
            if bases is None:
                bases = [word[: -len(old)] + new for old, new in rules if word.endswith(old)]
            entries = self.entries[part]
            found += [entries[form] for form in [word, *bases] if form in entries]
        return found


def rate(count, work, seconds):
    """Items per second by the clock and by processor time, over the passes that fit into the time, after one more."""
    work()
    begin, busy, passes = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        work()
        passes += 1
    return count * passes / (time.perf_counter() - begin), count * passes / (time.process_time() - busy)


def text_metrics(path, seconds):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(r["hypothesis"], r["reference"]) for r in rows]
    wordnet, smooth = WordNet(), SmoothingFunction().method1
    scorers = {n: rouge_scorer.RougeScorer([n], use_stemmer=True) for n in ["rouge1", "rouge2", "rougeL"]}
    yield "meteor", rate(len(pairs), lambda: [single_meteor_score(r.split(), h.split(), wordnet=wordnet) for h, r in pairs], seconds)
    for name, scorer in scorers.items():
        yield name, rate(len(pairs), lambda: [scorer.score(r, h) for h, r in pairs], seconds)
    yield "bleu", rate(len(pairs), lambda: [sentence_bleu([r.split()], h.split(), smoothing_function=smooth) for h, r in pairs], seconds)


def encoder(seconds, rows=16, length=64):
    """The encoder that bert_score runs: 17 layers of roberta-large, random weights."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=50265, hidden_size=1024, num_hidden_layers=17, num_attention_heads=16,
                           intermediate_size=4096, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    model = RobertaModel(config, add_pooling_layer=False).eval()
    ids = torch.arange(rows * length).mul(7919).remainder(50_000).add(4).view(rows, length)
    with torch.inference_mode():
        return rate(rows * length, lambda: model(ids, attention_mask=torch.ones_like(ids)), seconds)


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    source = Path(sys.argv[3]) if len(sys.argv) > 3 else ROOT / "tests/golden/metrics/meteor.jsonl"
    if part != "encoder":
        for name, (clock, busy) in text_metrics(source, seconds):
            print(f"{name}\t{clock:.0f} pairs/s ({busy:.0f})", flush=True)
    if part != "text":
        clock, busy = encoder(5 * seconds)
        print(f"roberta_large_17\t{clock:.1f} tokens/s ({busy:.1f}), {torch.get_num_threads()} threads", flush=True)
