"""TensorBoard reads a run's event files and finds the numbers of metrics.jsonl.

    python3 -m venv venv && venv/bin/pip install tensorboard==2.21.0
    venv/bin/python scripts/interop/tensorboard_events.py RUN…

Each value is compared with the line it was made from, as f32; a step that comes
twice, lacks, or is of a metric that is not in the file is a failure.
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing import event_accumulator, event_file_loader
from tensorboard.util import tensor_util


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def expected(run):
    """tag → [(step, value)] from metrics.jsonl and samples.jsonl."""
    curves, texts = {}, {}

    def add(tag, step, value):
        if value is not None:
            curves.setdefault(tag, []).append((step, f32(value)))

    for line in (run / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        step = m["step"]
        if m["kind"] == "train":
            for key in ("loss", "lr", "grad_norm"):
                add(f"train/{key}", step, m[key])
            add("speed/tokens_per_second", step, m["tokens_per_second"])
            add("speed/data_seconds", step, m["data_seconds"])
            add("memory/rss_bytes", step, m["rss_bytes"])
        elif m["kind"] == "eval":
            add("val/loss", step, m["val_loss"])
        else:
            add("weights/zero_share", step, m["zero_share"])
            add("weights/flip_rate", step, m["flip_rate"])
            for layer in m["layers"]:
                name = layer["layer"].removeprefix("model.layers.")
                add(f"zero_share/{name}", step, layer["zero"] / layer["weights"])
                if layer["flips"] is not None:
                    add(f"flip_rate/{name}", step, layer["flips"] / layer["weights"])
    for line in (run / "samples.jsonl").read_text().splitlines():
        m = json.loads(line)
        texts.setdefault("sample/" + m["prompt"], []).append((m["step"], m["text"]))
    return curves, texts


def check(run):
    curves, texts = expected(run)
    folder = run / "tensorboard"
    everything = dict.fromkeys(("scalars", "tensors"), 0)
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    # One file after the other, without TensorBoard's own rules for restarts.
    raw = {}
    files = sorted(folder.glob("events.out.tfevents.*"))
    for file in files:
        for event in event_file_loader.LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                raw.setdefault(value.tag, []).append(event.step)
    failures = []
    for tag, points in curves.items():
        found = [(e.step, f32(e.value)) for e in accumulator.Scalars(tag)]
        if found != points:
            failures.append(f"{tag}: {len(found)} values, expected {len(points)}")
    for tag, points in texts.items():
        found = []
        for event in accumulator.Tensors(tag):
            text = tensor_util.make_ndarray(event.tensor_proto)[0].decode()
            found.append((event.step, text[4:].replace("\n    ", "\n")))
        if found != points:
            failures.append(f"{tag}: {found} is not {points}")
    tags = accumulator.Tags()
    extra = set(tags["scalars"]) - set(curves) | set(tags["tensors"]) - set(texts)
    if extra:
        failures.append(f"tags that no metric has: {sorted(extra)}")
    for tag, steps in raw.items():
        if len(set(steps)) != len(steps):
            failures.append(f"{tag}: a step is in the files twice")
    for failure in failures:
        print(f"{run}: {failure}", file=sys.stderr)
    values = sum(map(len, curves.values()))
    print(f"{run}: {len(files)} files, {len(curves)} curves of {values} values, {len(texts)} texts")
    return not failures


if __name__ == "__main__":
    runs = [pathlib.Path(run) for run in sys.argv[1:]]
    sys.exit(0 if runs and all([check(run) for run in runs]) else 1)
