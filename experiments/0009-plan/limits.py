"""The limits of a bench with all its threads, as options of bitnet-eval plan."""

import json
import sys

with open(sys.argv[1]) as file:
    limits = json.load(file)["limits"]
read = max(limits["read"], key=lambda limit: limit["threads"])
int8 = max(limits["int8"], key=lambda limit: limit["threads"])
print(f"--bandwidth {read['gb_per_second']:.3f} --int8-peak {int8['gop_per_second']:.1f}")
