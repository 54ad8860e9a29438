"""Perplexity in llama.cpp's way from llama.cpp's own probabilities, beside `bitnet-eval
perplexity --mode llama-cpp`.

    pip install xllamacpp tokenizers
    bitnet-export CHECKPOINT -o model.gguf
    bitnet-export CHECKPOINT -o f16.gguf --format gguf-f16
    python scripts/interop/llama_cpp_perplexity.py model.gguf f16.gguf CHECKPOINT/tokenizer.json \
        TEXT [--context 256] [--chunks 4] [--bitnet-eval PATH]

llama-perplexity's algorithm (tools/perplexity/perplexity.cpp): the text is tokenised once and
cut into chunks of the context, and in each the tokens behind the first half are scored, each
after all before it in its chunk. The probabilities are those of llama.cpp's server, asked for
all of the vocabulary; each answer is checked to add up to 1. For a tokenizer that puts no token
before a text.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import xllamacpp
from tokenizers import Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("exported")
    parser.add_argument("tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--bitnet-eval", default="bitnet-eval")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    vocabulary = tokenizer.get_vocab_size()
    ids = tokenizer.encode(args.text.read_text(), add_special_tokens=False).ids
    chunks = [ids[i : i + args.context] for i in range(0, len(ids), args.context)]
    chunks = [c for c in chunks if len(c) == args.context][: args.chunks]
    params = xllamacpp.CommonParams()
    params.model.path = args.exported
    params.n_ctx = args.context + 8
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)

    def log_prob(prompt, target):
        answer = server.handle_completions({
            "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": vocabulary,
            "n_probs": vocabulary, "cache_prompt": True,
        })
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        assert answer["usage"]["prompt_tokens"] == len(prompt), answer["usage"]
        found = {t["id"]: t["logprob"] for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        total = sum(math.exp(p) for p in found.values())
        assert abs(total - 1) < 1e-4, total
        return found[target]

    scores = []
    for n, chunk in enumerate(chunks):
        for at in range(args.context // 2 + 1, args.context):
            scores.append(-log_prob(chunk[:at], chunk[at]))
        mean = sum(scores) / len(scores)
        print(f"[{n + 1}] {math.exp(mean):.4f}", flush=True)
    mean = sum(scores) / len(scores)
    variance = sum(s * s for s in scores) / len(scores) - mean * mean
    error = math.exp(mean) * math.sqrt(variance / (len(scores) - 1))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "perplexity.json"
        subprocess.run(
            [args.bitnet_eval, "perplexity", args.model, "--text", args.text, "--mode", "llama-cpp",
             "--context", str(args.context), "--windows", str(len(chunks)), "--json", out],
            check=True, stdout=subprocess.DEVNULL,
        )
        ours = json.loads(out.read_text())
    assert ours["tokens"] == len(scores), (ours["tokens"], len(scores))
    theirs, found = math.exp(mean), ours["perplexity"]
    mine = found * ours["nats_stderr_tokens"]
    print(f"{len(scores)} tokens in {len(chunks)} chunks of {args.context}")
    print(f"llama.cpp {theirs:.4f} ± {error:.4f}, bitnet-eval {found:.4f} ± {mine:.4f}: "
          f"{100 * (found / theirs - 1):+.3f} %")


if __name__ == "__main__":
    main()
