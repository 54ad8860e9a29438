"""Goes on with a model in PyTorch FSDP: loads a Hugging Face folder with transformers, shards
it over the processes, trains some steps on text and writes a folder that `bitnet-export`
reads. On CPUs with gloo, on GPUs with nccl.

    pip install torch transformers accelerate safetensors
    bitnet-export runs/x -o hf --format hf-bf16
    torchrun --nproc-per-node 2 scripts/interop/fsdp.py hf TEXT... -o hf-more --steps 3
    bitnet-export import hf-more -o more.gguf

The folder may be one that `--format hf-bf16` wrote (masters of the exported ternary values)
or a checkpoint of a run itself (its master weights, in f32). The linear layers are
transformers' AutoBitLinear in its online mode: quantised in the forward pass, with
straight-through gradients. Master weights are f32 here, and written as such.

Every process takes its own windows of the text. At the end the folder is loaded again, by one
process without FSDP, and must give the loss that the sharded model gave.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

torch._dynamo.config.disable = True
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

# What a folder holds beside its weights.
BESIDE = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="windows of a process in a step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    return parser.parse_args()


def load(folder, device):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    return model.to(device)


def windows(folder, paths, context):
    """The text as windows of `context` + 1 tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = [i for path in paths for i in tokenizer(path.read_text())["input_ids"]]
    count = len(ids) // (context + 1)
    return torch.tensor(ids[: count * (context + 1)]).view(count, context + 1)


def loss_of(model, batch):
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def save(state, folder, out):
    out.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    for name in BESIDE:
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)


def main():
    args = arguments()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    data = windows(args.folder, args.text, args.context)
    need = args.steps * args.batch * ranks + 1
    if len(data) < need:
        raise SystemExit(f"the text has {len(data)} windows of {args.context} tokens, {need} are needed")
    model = load(args.folder, device)
    linear = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"rank {rank} of {ranks}: {kept} of {whole} parameters, {sorted(linear)}", flush=True)

    held_out = data[-1:].to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        first = (step * ranks + rank) * args.batch
        loss = loss_of(model, data[first : first + args.batch].to(device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item() / ranks:.4f}, gradient norm {norm.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        sharded = loss_of(model, held_out).item()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save(state, args.folder, args.out)
        with torch.no_grad():
            again = loss_of(load(args.out, torch.device("cpu")).eval(), held_out.cpu()).item()
        with torch.no_grad():
            before = loss_of(load(args.folder, torch.device("cpu")).eval(), held_out.cpu()).item()
        print(f"held-out loss {before:.4f} before, {sharded:.4f} after, {again:.4f} of {args.out} loaded again")
        if abs(sharded - again) > 1e-3 or before == again:
            raise SystemExit("what was written is not what was trained")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
