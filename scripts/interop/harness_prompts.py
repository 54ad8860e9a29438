"""The prompts of lm-evaluation-harness with examples drawn by lot, beside those of
`bitnet-eval tasks --fewshot-seed`: no model of the harness is run.

    python scripts/interop/task_items.py items --words README.md docs/*.md
    python scripts/interop/harness_prompts.py model.gguf items [--bitnet-eval PATH] [--limit 20]
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
from lm_eval.tasks import TaskManager, get_task_dict  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("items", type=Path)
    parser.add_argument("--bitnet-eval", default="bitnet-eval")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--num-fewshot", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    names = sorted(path.stem for path in args.items.glob("*.jsonl"))
    manager = TaskManager(include_path=str(args.items / "yaml"), include_defaults=False)
    tasks = get_task_dict([f"lot_{name}" for name in names], manager)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        run = [args.bitnet_eval, "tasks", args.model, "--output", folder, "--limit", str(args.limit),
               "--num-fewshot", str(args.num_fewshot), "--fewshot-seed", str(args.seed)]
        for name in names:
            kind = args.items / "own.toml" if name == "own" else name
            pair = f"{kind}={args.items / name}.jsonl"
            run += ["--task", pair, "--fewshot", pair]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        for name in names:
            task = tasks[f"lot_{name}"]
            task.set_config(key="num_fewshot", value=args.num_fewshot)
            task.set_fewshot_seed(seed=args.seed)
            task.build_all_requests(limit=args.limit, rank=0, world_size=1)
            theirs = {}
            for instance in task.instances:
                theirs.setdefault(instance.doc_id, []).append(list(instance.args[:2]))
            lines = (Path(folder) / f"samples_{name}.jsonl").read_text().splitlines()
            mine = [[[g["arg_0"], g["arg_1"]] for g in json.loads(line)["arguments"].values()]
                    for line in lines]
            alike = sum(theirs[i] == pairs for i, pairs in enumerate(mine))
            print(f"{name}: {alike} of {len(mine)} questions have the same prompts and choices")
            failed |= alike < len(mine) or len(mine) < args.limit
    sys.exit("other prompts" if failed else 0)


if __name__ == "__main__":
    main()
