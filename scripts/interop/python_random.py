"""Records what CPython's `random.Random(seed)` draws, for the tests of `bitnet-eval tasks
--fewshot-seed`.

    python scripts/interop/python_random.py > crates/bitnet-eval/src/tasks/python_random.json
"""

import json
import random
import sys

# Both ways in which `sample` works, and the borders between them.
SIZES = [(1, 1), (5, 2), (8, 8), (21, 3), (22, 3), (22, 5), (277, 5), (277, 6), (85, 6), (86, 6),
         (85, 21), (86, 21), (277, 22), (2376, 25), (39905, 10), (1, 0), (4, 3), (1024, 5), (9427, 5)]


def case(seed, sizes):
    rng = random.Random(seed)
    draws = [{"n": n, "k": k, "sample": rng.sample(range(n), k)} for n, k in sizes]
    return {"seed": seed, "draws": draws}


def main():
    cases = [case(seed, SIZES) for seed in [0, 1, 42, 1234, 2**32 - 1, 2**32, 2**33 + 5, 2**63 + 11]]
    cases += [case(1234, [size] * 6) for size in
              [(240, 2), (240, 3), (8, 3), (300, 25), (300, 26), (16, 5)]]
    cases += [case(1234, [(1119, k)] * 6) for k in (1, 2, 4, 5, 6, 7, 25, 26)]
    rng = random.Random(7)
    bits = [[k, rng.getrandbits(k)] for k in (33, 64, 1, 32, 63)]
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    version = "CPython %d.%d.%d" % sys.version_info[:3]
    print(f'{{"python":"{version}",\n"getrandbits_seed_7":{json.dumps(bits)},\n"cases":[\n{lines}\n]}}')


if __name__ == "__main__":
    main()
