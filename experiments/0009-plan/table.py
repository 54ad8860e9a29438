"""The table of this folder: of every size, predictions and measurements of all rounds."""

import json
import pathlib
import statistics
import sys

work = pathlib.Path(sys.argv[1])
print("| model | form | test | predicted (median) | measured (median) | error (of medians) |")
print("|---|---|---|---|---|---|")
for size in ["125m", "700m", "2b4t", "7b"]:
    plans = [json.loads(p.read_text()) for p in sorted(work.glob(f"{size}-*-plan.json"))]
    benches = [json.loads(p.read_text()) for p in sorted(work.glob(f"{size}-*-bench.json"))]
    if not plans:
        continue
    form = plans[0]["form"]
    for key, kind in [("decode", "tg"), ("prefill", "pp")]:
        test = f"{kind}{plans[0][key]['tokens']}"
        rows = [r for b in benches for r in b["results"] if r["test"] == test]
        predicted = [p[key]["tokens_per_second"] for p in plans]
        fastest = [r["tokens_per_second_max"] for r in rows]
        medians = [r["tokens_per_second"] for r in rows]
        best, middle = max(predicted), statistics.median(predicted)
        measured, usual = max(fastest), statistics.median(medians)
        print(
            f"| {size} | {form} | {test}, tokens/s | {best:.1f} ({middle:.1f}) "
            f"| {measured:.1f} ({usual:.1f}) "
            f"| {100 * (best / measured - 1):+.1f} % ({100 * (middle / usual - 1):+.1f} %) |"
        )
    predicted = max(p["run"]["bytes"] for p in plans) / 1e6
    measured = max(r["peak_rss_bytes"] for b in benches for r in b["results"]) / 1e6
    print(
        f"| {size} | {form} | memory, MB | {predicted:.0f} | {measured:.0f} "
        f"| {100 * (predicted / measured - 1):+.1f} % |"
    )
