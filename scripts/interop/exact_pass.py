"""A forward pass of a Hugging Face folder of ternary weights in f64, with int8 activations
times ternary weights in whole numbers: what every f32 program rounds from. Shares no code
with the engine or with transformers.

Folders: `BitNetForCausalLM` and `LlamaForCausalLM`; `linear_class` `bitlinear` (the scale
divides) or `autobitlinear` (it multiplies), packed or master weights, one file.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

# The vectors of a block that are quantised, each with a layer that reads it.
INPUTS = {
    "q, k, v": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "gate, up": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def ternary(weight, scale, divides):
    """Ternary values [out, in] and the scale that multiplies them."""
    if weight.dtype == torch.uint8:
        codes = torch.cat([(weight >> (2 * i)) & 3 for i in range(4)])
        scale = float(scale.to(torch.float64).reshape(-1)[0])
        return codes.numpy().astype(np.float64) - 1, 1 / scale if divides else scale
    # Master weights: the mean magnitude, rounded to f32.
    weight = weight.to(torch.float32).numpy()
    scale = np.float32(max(np.abs(weight.astype(np.float64)).mean(), 1e-5))
    values = np.clip(np.rint(weight * (np.float32(1) / scale)), -1, 1)
    return values.astype(np.float64), float(scale)


class ExactModel:
    """The folder's model; `blocks[i][name]` are ternary values and scale, or a norm."""

    def __init__(self, folder):
        folder = Path(folder)
        self.config = c = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        plain = lambda name: tensors[name].to(torch.float64).numpy()
        divides = c["quantization_config"].get("linear_class", "bitlinear") == "bitlinear"
        self.embedding = plain("model.embed_tokens.weight")
        tied = "lm_head.weight" not in tensors
        self.head = self.embedding if tied else plain("lm_head.weight")
        self.norm = plain("model.norm.weight")
        self.eps = c["rms_norm_eps"]
        self.theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.blocks = []
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            block = {}
            for name in LINEARS:
                weight = prefix + name + ".weight"
                block[name] = ternary(tensors[weight], tensors.get(weight + "_scale"), divides)
            norms = ["input_layernorm", "post_attention_layernorm"]
            norms += ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]
            for name in norms:
                weight = prefix + name + ".weight"
                block[name] = plain(weight) if weight in tensors else None
            self.blocks.append(block)

    def rms_norm(self, x, weight):
        if weight is None:
            return x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def rotate(self, x):  # [H, T, C], halves rotated
        half = self.head_dim // 2
        angles = np.arange(x.shape[1])[:, None] * self.theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, q, k, v):  # [T, heads * C] each
        split = lambda x: x.reshape(len(x), -1, self.head_dim).transpose(1, 0, 2)
        q, k, v = self.rotate(split(q)), self.rotate(split(k)), split(v)
        group = self.heads // self.kv_heads
        k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
        scores = np.einsum("htc,hsc->hts", q, k) / np.sqrt(self.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,hsc->thc", weights, v).reshape(q.shape[1], -1)

    def run(self, tokens, other_way=()):
        """Logits [T, V], and for each block and input the values before rounding and the
        integers, [T, in]. `other_way`: (block, input, position, index) of activations that
        are rounded to the other neighbour."""
        rounded = {}

        def quantize(x, layer, name):
            absmax = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
            values = x * 127 / absmax
            q = np.clip(np.rint(values), -128, 127)
            for at_layer, at_name, t, i in other_way:
                if (at_layer, at_name) == (layer, name):
                    q[t, i] = np.floor(values[t, i]) + np.ceil(values[t, i]) - q[t, i]
            rounded[layer, name] = values, q
            return q, absmax / 127

        def linear(block, name, quantized):
            (weight, scale), (q, act_scale) = block[name], quantized
            return (q @ weight.T) * (act_scale * scale)

        x = self.embedding[tokens]
        for layer, b in enumerate(self.blocks):
            h = quantize(self.rms_norm(x, b["input_layernorm"]), layer, "q, k, v")
            a = self.attention(*(linear(b, f"self_attn.{n}_proj", h) for n in "qkv"))
            a = quantize(self.rms_norm(a, b["self_attn.attn_sub_norm"]), layer, "o")
            x = x + linear(b, "self_attn.o_proj", a)
            h = quantize(self.rms_norm(x, b["post_attention_layernorm"]), layer, "gate, up")
            gate, up = linear(b, "mlp.gate_proj", h), linear(b, "mlp.up_proj", h)
            relu2 = self.config["hidden_act"] == "relu2"
            g = np.maximum(gate, 0) ** 2 * up if relu2 else gate / (1 + np.exp(-gate)) * up
            g = quantize(self.rms_norm(g, b["mlp.ffn_sub_norm"]), layer, "down")
            x = x + linear(b, "mlp.down_proj", g)
        return self.rms_norm(x, self.norm) @ self.head.T, rounded
