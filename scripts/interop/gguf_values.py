"""Reads files that bitnet-export wrote with other people's readers and compares
the values: GGUF files by gguf-py, the packed folder by safetensors and NumPy.

    pip install gguf==0.19.0 safetensors numpy
    bitnet-export model.gguf -o hf --format hf-packed
    bitnet-export model.gguf -o m.tq1.gguf --format gguf-tq1_0     # and the others
    python scripts/interop/gguf_values.py hf m.tq1.gguf m.tq2.gguf m.f16.gguf

gguf-py cannot decode I2_S: its codes are taken apart here, 128 in 32 bytes.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def unpack(packed, rows):
    codes = np.concatenate([packed >> (2 * i) & 3 for i in range(4)])
    return codes[:rows].astype(np.int8) - 1


def permute(w, heads):
    """As llama.cpp's converter does for q and k of LLaMA."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def i2_s(data, shape):
    raw = np.frombuffer(data.tobytes(), np.uint8)
    n = shape[0] * shape[1]
    blocks = raw[: n // 4].reshape(-1, 32)
    codes = np.stack([blocks >> s & 3 for s in (6, 4, 2, 0)], 1).reshape(shape)
    return codes.astype(np.float32) - 1, raw[n // 4 : n // 4 + 4].view(np.float32)[0]


def read_i2_s(path):
    """gguf-py refuses type 36: let it believe in bytes of the right number."""
    types = gguf.GGMLQuantizationType
    if 36 not in [t.value for t in types]:
        member = int.__new__(types, 36)
        member._name_, member._value_ = "I2_S", 36
        types._value2member_map_[36] = member
        # The tail of 32 bytes is read from the file below.
        gguf.constants.GGML_QUANT_SIZES[member] = (4, 1)
        gguf.gguf_reader.GGML_QUANT_SIZES[member] = (4, 1)
    return gguf.GGUFReader(path)


folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
hf = load_file(folder / "model.safetensors")
for path in sys.argv[2:]:
    reader = read_i2_s(path)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    tensors = {t.name: t for t in reader.tensors}
    compared = 0
    for layer in range(config["num_hidden_layers"]):
        for name, short in LINEAR.items():
            key = f"model.layers.{layer}.{name}.weight"
            t = tensors[f"blk.{layer}.{short}.weight"]
            shape = tuple(int(d) for d in reversed(t.shape))
            want = unpack(hf[key], shape[0])
            scale = hf[key + "_scale"][0]
            if arch == "llama" and short in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if short == "attn_q" else "num_key_value_heads"]
                want = permute(want, heads)
            if int(t.tensor_type) == 36:
                start = t.data_offset
                raw = reader.data[start : start + shape[0] * shape[1] // 4 + 32]
                found, found_scale = i2_s(raw, shape)
            else:
                found = gguf.dequantize(t.data, t.tensor_type).reshape(shape)
                found_scale = tensors[f"blk.{layer}.{short}.scale"].data[0]
            assert np.array_equal(found, want.astype(np.float32)), (path, key)
            assert found_scale == scale, (path, key, found_scale, scale)
            compared += want.size
    print(f"{path}: {arch}, {compared} ternary values and their scales are the same")
