"""lm-evaluation-harness beside `bitnet-eval tasks`, question by question.

    pip install lm_eval torch transformers accelerate
    bitnet-export CHECKPOINT -o model.gguf
    bitnet-export CHECKPOINT -o hf --format hf-bf16
    python scripts/interop/task_items.py items --words README.md docs/*.md
    python scripts/interop/harness_tasks.py hf model.gguf items [--bitnet-eval PATH] [--limit N]

HF is a Hugging Face folder, MODEL what `bitnet-eval` opens. For each task: whether every prompt
is the same text, on how many questions both choose alike by each metric, both accuracies, and
how far apart the log-probabilities are. Every question on which they differ is printed with how
close the two choices are to each other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402

torch._dynamo.config.disable = True
import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

LENGTH = {"acc": lambda c: 1, "acc_norm": len, "acc_bytes": lambda c: len(c.encode())}


def harness(folder, dtype, items, names, limit, shots, seed):
    kind = "local" if seed is None else "lot"
    manager = TaskManager(include_path=str(items / "yaml"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": dtype,
                    "attn_implementation": "eager"},
        tasks=[f"{kind}_{name}" for name in names],
        task_manager=manager, limit=limit, num_fewshot=shots, batch_size=1, bootstrap_iters=0, device="cpu",
        **({} if seed is None else {"fewshot_random_seed": seed}),
    )
    return ({name: found["samples"][f"{kind}_{name}"] for name in names},
            {name: found["results"][f"{kind}_{name}"] for name in names})


def ours(program, model, items, names, limit, shots, seed, folder):
    run = [program, "tasks", model, "--output", folder]
    for name in names:
        kind = items / "own.toml" if name == "own" else name
        run += ["--task", f"{kind}={items / name}.jsonl"]
        run += ["--fewshot", f"{kind}={items / name}.jsonl"] if shots else []
    run += ["--limit", str(limit)] if limit else []
    run += ["--num-fewshot", str(shots)] if shots else []
    run += ["--fewshot-seed", str(seed)] if seed is not None else []
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    samples = {name: read(Path(folder) / f"samples_{name}.jsonl") for name in names}
    return samples, json.loads((Path(folder) / "results.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf")
    parser.add_argument("model")
    parser.add_argument("items", type=Path)
    parser.add_argument("--bitnet-eval", default="bitnet-eval")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int, default=0, help="the first questions, solved")
    parser.add_argument("--fewshot-seed", type=int, help="draw those by lot, as the harness does by default")
    parser.add_argument("--tasks", nargs="+", help="some of the tasks only")
    parser.add_argument("--dtype", default="float32", help="what the harness computes in")
    args = parser.parse_args()
    names = sorted(args.tasks or (path.stem for path in args.items.glob("*.jsonl")))
    theirs, their_results = harness(args.hf, args.dtype, args.items, names, args.limit, args.num_fewshot, args.fewshot_seed)
    with tempfile.TemporaryDirectory() as folder:
        mine, my_results = ours(args.bitnet_eval, args.model, args.items, names, args.limit, args.num_fewshot, args.fewshot_seed, folder)
    failed = False
    print(f"lm_eval {lm_eval.__version__ if hasattr(lm_eval, '__version__') else ''}, torch {torch.__version__}")
    print("task | questions | prompts alike | metric | alike | harness | ours | largest |Δ ln p|, median")
    for name in names:
        a, b = sorted(theirs[name], key=lambda s: s["doc_id"]), mine[name]
        assert len(a) == len(b), (name, len(a), len(b))
        texts = sum(
            [list(arg) for arg in s["arguments"]]
            == [[g["arg_0"], g["arg_1"]] for g in t["arguments"].values()]
            for s, t in zip(a, b)
        )
        scores = [
            (np.array([r[0][0] for r in s["resps"]], float),
             np.array([float(r[0]) for r in t["filtered_resps"]]))
            for s, t in zip(a, b)
        ]
        gaps = np.concatenate([np.abs(x - y) for x, y in scores])
        for metric in ("acc",) if name == "winogrande" else LENGTH:
            alike, differ = 0, []
            for s, t, (x, y) in zip(a, b, scores):
                choices = [g["arg_1"][1:] for g in t["arguments"].values()]
                length = np.array([LENGTH[metric](c) for c in choices], float)
                p, q = int(np.argmax(x / length)), int(np.argmax(y / length))
                alike += p == q
                # What each program calls right must be what its own scores say.
                if p == q and s[metric] != t[metric]:
                    sys.exit(f"{name} {s['doc_id']}: {metric} {s[metric]} and {t[metric]}")
                if p != q:
                    differ.append((s["doc_id"], p, q, abs((x / length)[p] - (x / length)[q]),
                                   abs((y / length)[p] - (y / length)[q]), np.abs(x - y).max()))
            key = f"{metric},none"
            their = their_results[name][key]
            my = my_results["results"][name][key]
            print(f"{name} | {len(a)} | {texts} | {metric} | {100 * alike / len(a):.1f} % | {their:.4f} | "
                  f"{my:.4f} | {gaps.max():.3f}, {np.median(gaps):.1e}")
            for id, p, q, near, mine_near, apart in differ:
                print(f"    question {id}: harness {p}, ours {q}; the two choices are {near:.4f} apart "
                      f"there and {mine_near:.4f} here, its scores differ by up to {apart:.4f}")
            failed |= alike < 0.99 * len(a)
        failed |= texts < len(a)
    sys.exit("below 99 %, or other prompts" if failed else 0)


if __name__ == "__main__":
    main()
