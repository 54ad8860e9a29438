"""Loads a Hugging Face folder that bitnet-export wrote with transformers (CPU, f32)
and compares its logits with stored ones: `ref.json` (token sequences) and
`seqN.npy` (float32 [T, V]) of a reference folder.

    pip install torch transformers accelerate numpy
    bitnet-export import crates/bitnet-engine/tests/fixtures/bitnet_tiny_packed \
        --tokenizer tokenizer.json -o m.gguf
    bitnet-export m.gguf -o hf --format hf-packed
    python scripts/interop/transformers_logits.py hf crates/bitnet-engine/tests/fixtures/bitnet_tiny_packed

Where one activation rounds the other way, the logits from there on differ by per
cents: the first such position of a sequence is printed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

torch._dynamo.config.disable = True
from transformers import AutoModelForCausalLM  # noqa: E402

folder, reference = sys.argv[1], Path(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
model.eval()
print(type(model).__name__, {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
sequences = json.loads((reference / "ref.json").read_text())["sequences"]
for i, sequence in enumerate(sequences):
    want = np.load(reference / f"seq{i}.npy")
    with torch.no_grad():
        found = model(torch.tensor([sequence["tokens"]])).logits[0].float().numpy()
    difference = np.abs(found - want).max(axis=1)
    parts = np.flatnonzero(difference > 1e-4)
    steady = parts[0] if len(parts) else len(difference)
    print(
        f"sequence {i}: {len(difference)} positions, largest difference {difference[:steady].max(initial=0):.1e}"
        + (f", then from position {steady} on {difference.max():.1e}" if len(parts) else "")
    )
