"""Loads a Hugging Face folder that bitnet-export wrote with transformers (CPU, f32) and
compares its logits with those of an exact-integer f64 pass over the same folder.

    pip install torch transformers accelerate numpy safetensors
    bitnet-export import crates/bitnet-engine/tests/fixtures/bitnet_tiny_packed \\
        --tokenizer tokenizer.json -o m.gguf
    bitnet-export m.gguf -o hf --format hf-packed
    python scripts/interop/transformers_logits.py hf crates/bitnet-engine/tests/fixtures/bitnet_tiny_packed

The second folder has the token sequences (`ref.json`, prompt and greedy text) and, of the
model that the folder was made from, stored logits (`seqN.npy`, float32 [T, V]).

Random models are chaotic: where one activation rounds the other way, the logits from there
on differ by per cents. Hooks record what every linear layer of transformers is given; each
activation whose integer is not that of the f64 pass is listed with its distance to the half,
and the f64 pass is run again with it rounded as transformers rounds it. It fails, with exit
code 1, where a distance is larger than f32 explains, or where logits still differ then.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

torch._dynamo.config.disable = True
from transformers import AutoModelForCausalLM  # noqa: E402

from exact_pass import INPUTS, ExactModel  # noqa: E402

# Of a step of the int8 grid: values reach 127, and transformers sums products of floats.
NEAR = 1e-4
# Of logits of a few units, once all integers are alike.
ALIKE = 1e-4


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    # Buffers of packed folders, scales among them, may keep another type.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
    return model.eval()


def with_hooks(model):
    """The inputs of the linear layers of a run, scaled to the int8 grid as transformers
    does it: [T, in] by block and input."""
    seen = {}

    def hook(key):
        def note(_module, args):
            x = args[0][0].float()
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            seen[key] = (x * scale).numpy()

        return note

    for layer, block in enumerate(model.model.layers):
        for name, linear in INPUTS.items():
            block.get_submodule(linear).register_forward_pre_hook(hook((layer, name)))
    return seen


def first_flips(theirs, exact, known):
    """The activations of the first position at which integers differ, in the first input
    of it where they do: what differs behind that may follow from it."""
    found = []
    for order, (key, values) in enumerate(theirs.items()):
        for t, i in np.argwhere(np.clip(np.rint(values), -128, 127) != exact[key][1]):
            if (*key, int(t), int(i)) not in known:
                found.append((int(t), order, key, int(i)))
    here = [f for f in found if f[:2] == min(found)[:2]]
    return [(*key, t, i) for t, _, key, i in here]


def check(name, model, seen, exact_model, tokens, stored):
    """Whether every difference is explained."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float().numpy()
    theirs = dict(seen)
    flips, good = [], True
    while True:
        want, exact = exact_model.run(tokens, flips)
        more = first_flips(theirs, exact, flips)
        if not more:
            break
        for layer, input_name, t, i in more:
            ours, other = exact[layer, input_name][0][t, i], theirs[layer, input_name][t, i]
            distance = abs(ours - np.floor(ours) - 0.5)
            explained = distance < NEAR and abs(ours - other) < 2 * NEAR
            good &= bool(explained)
            print(
                f"  position {t}, block {layer}, input of {input_name}, element {i}: "
                f"{ours:.7f} in f64, {other:.7f} in transformers, {distance:.1e} from the half"
                + ("" if explained else ": NOT EXPLAINED")
            )
        flips += more
        if not good:
            return False
    difference = np.abs(logits - want).max()
    good = bool(difference < ALIKE)
    first = min((t for _, _, t, _ in flips), default=len(tokens))
    steady = np.abs(logits[: min(first, len(stored))] - stored[:first]).max(initial=0)
    print(
        f"{name}: {len(tokens)} positions, {len(flips)} flips, largest difference of a logit "
        f"{difference:.1e}" + ("" if good else ": NOT EXPLAINED")
        + f"; of the stored ones before any flip {steady:.1e}"
    )
    return good


def main():
    folder, reference = sys.argv[1], Path(sys.argv[2])
    model = load(folder)
    linears = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    print(type(model).__name__, linears)
    seen, exact_model = with_hooks(model), ExactModel(folder)
    good = True
    for i, sequence in enumerate(json.loads((reference / "ref.json").read_text())["sequences"]):
        tokens = sequence["tokens"] + sequence["greedy_no_cache"]
        stored = np.load(reference / f"seq{i}.npy")
        good &= check(f"sequence {i}", model, seen, exact_model, tokens, stored)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
