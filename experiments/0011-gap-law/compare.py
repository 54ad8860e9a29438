"""The table of ablations: losses by seed, and the difference from the base with the same
seed.  compare.py RUNS SIZE-QUANTISER-RATE"""

import json
import pathlib
import statistics
import sys

runs, base = pathlib.Path(sys.argv[1]), sys.argv[2]
losses = {}
for folder in runs.glob(f"{base}-*"):
    seed, _, variant = folder.name[len(base) + 1 :].partition("-")
    result = folder / "train.json"
    if result.exists():
        losses.setdefault(variant, {})[seed] = json.loads(result.read_text())["val_loss"]

print("| changed | mean loss | less base, by seed | mean difference |")
print("|---|---|---|---|")
for variant, by_seed in sorted(losses.items(), key=lambda item: item[0]):
    differences = [loss - losses[""][seed] for seed, loss in sorted(by_seed.items()) if seed in losses[""]]
    shown = ", ".join(f"{d:+.4f}" for d in differences) if variant else ", ".join(
        f"{loss:.4f}" for _, loss in sorted(by_seed.items())
    )
    mean = f"{statistics.mean(differences):+.4f}" if variant and differences else ""
    print(f"| {variant or 'nothing: the losses themselves'} | {statistics.mean(by_seed.values()):.4f} | {shown} | {mean} |")
