"""The table of this folder: medians of all rounds, and the span of the rounds' errors.

"before" is what plan predicts from its own rates, measured before the bench; "limits" what
it predicts from the read bandwidth and int8 peak that were measured in the bench's rounds.
"""

import json
import pathlib
import statistics
import sys

work = pathlib.Path(sys.argv[1])


def load(size, kind):
    files = work.glob(f"{size}-*-{kind}.json")
    return {path.name.split("-")[1]: json.loads(path.read_text()) for path in files}


def error(predicted, measured):
    errors = [100 * (p / m - 1) for p, m in zip(predicted, measured)]
    return f"{statistics.median(errors):+.0f} % ({min(errors):+.0f} to {max(errors):+.0f})"


print("| model | form | test | rounds | measured | before | error | limits | error |")
print("|---|---|---|---|---|---|---|---|---|")
memory = []
for size in ["125m", "700m", "2b4t", "7b"]:
    plans, limits, benches = (load(size, kind) for kind in ["plan", "limits", "bench"])
    rounds = sorted(set(plans) & set(limits) & set(benches))
    if not rounds:
        continue
    form = plans[rounds[0]]["form"]
    for key, kind in [("decode", "tg"), ("prefill", "pp")]:
        test = f"{kind}{plans[rounds[0]][key]['tokens']}"
        rows = [row for r in rounds for row in benches[r]["results"] if row["test"] == test]
        measured = [row["tokens_per_second"] for row in rows]
        before = [plans[r][key]["tokens_per_second"] for r in rounds]
        stated = [limits[r][key]["tokens_per_second"] for r in rounds]
        median = statistics.median
        print(
            f"| {size} | {form} | {test} | {len(rounds)} | {median(measured):.1f} "
            f"| {median(before):.1f} | {error(before, measured)} "
            f"| {median(stated):.1f} | {error(stated, measured)} |"
        )
    predicted = max(plans[r]["run"]["bytes"] for r in rounds) / 1e6
    peak = max(row["peak_rss_bytes"] for r in rounds for row in benches[r]["results"]) / 1e6
    memory.append(
        f"| {size} | {form} | {predicted:.0f} | {peak:.0f} | {100 * (predicted / peak - 1):+.1f} % |"
    )
print("\n| model | form | memory predicted, MB | measured, MB | error |")
print("|---|---|---|---|---|")
print("\n".join(memory))
