"""lm-evaluation-harness' task `wikitext` on local pages beside `bitnet-eval perplexity --mode
rolling --detokenize wikitext`.

    pip install lm_eval torch transformers accelerate
    python scripts/interop/harness_rolling.py hf hf README.md docs/*.md [--bitnet-eval PATH]

HF is a Hugging Face folder, MODEL what `bitnet-eval` opens; each text file is a page.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402

torch._dynamo.config.disable = True
import lm_eval  # noqa: E402
import lm_eval.tasks  # noqa: E402
import yaml  # noqa: E402

TASK = Path(lm_eval.tasks.__file__).parent / "wikitext" / "wikitext.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hf")
    parser.add_argument("model")
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bitnet-eval", default="bitnet-eval")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages, out = Path(folder) / "pages.jsonl", Path(folder) / "out.json"
        pages.write_text("".join(json.dumps({"page": p.read_text()}) + "\n" for p in args.pages))
        config = {
            "include": str(TASK), "task": "local_wikitext", "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(pages)}},
            "training_split": None, "validation_split": None,
        }
        (Path(folder) / "local.yaml").write_text(yaml.safe_dump(config))
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": args.hf, "dtype": args.dtype, "attn_implementation": "eager"},
            tasks=["local_wikitext"], batch_size=1, bootstrap_iters=0, device="cpu",
            task_manager=lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False),
        )["results"]["local_wikitext"]
        subprocess.run(
            [args.bitnet_eval, "perplexity", args.model, "--text", pages, "--field", "page",
             "--mode", "rolling", "--detokenize", "wikitext", "--json", out],
            check=True, stdout=subprocess.DEVNULL,
        )
        ours = json.loads(out.read_text())
    for name in ("word_perplexity", "bits_per_byte"):
        theirs = found[f"{name},none"]
        print(f"{name}: harness {theirs:.6g}, ours {ours[name]:.6g}: {100 * (ours[name] / theirs - 1):+.4f} %")
    print(f"{ours['documents']} documents, {ours['tokens']} tokens, {ours['words']} words, {ours['bytes']} bytes")


if __name__ == "__main__":
    main()
