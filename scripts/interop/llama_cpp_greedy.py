"""Greedy tokens of llama.cpp beside the engine's, for a GGUF file that we exported.

    python scripts/interop/llama_cpp_greedy.py MODEL.gguf EXPORTED.gguf [--bitnet PATH]

MODEL.gguf is the packed file, EXPORTED.gguf what `bitnet-export --format gguf-tq2_0` (or
gguf-tq1_0, gguf-f16) made of it. Needs `pip install xllamacpp`, which brings llama.cpp, or
with `--library llama_cpp` a `pip install llama-cpp-python`, which builds it here.
Prints, for each prompt, how many characters of the text of 64 tokens agree.
"""

import argparse
import json
import subprocess

PROMPTS = ["pub fn new(", "impl Iterator for ", "// SAFETY: the ", "let mut ", "fn main() {\n"]
TOKENS = 64


def engine(bitnet, model, prompt):
    run = [bitnet, "generate", model, prompt, "--tokens", str(TOKENS), "--temperature", "0"]
    out = subprocess.run([*run, "--json", "-"], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)["text"]


def of_xllamacpp(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)

    def complete(prompt):
        request = {
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        return answer["choices"][0]["text"]

    return complete


def of_llama_cpp(path):
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=256, verbose=False)

    def complete(prompt):
        model.reset()
        answer = model.create_completion(
            prompt, max_tokens=TOKENS, temperature=0.0, top_k=1, repeat_penalty=1.0
        )
        return answer["choices"][0]["text"]

    return complete


LIBRARIES = {"xllamacpp": of_xllamacpp, "llama_cpp": of_llama_cpp}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("exported")
    parser.add_argument("--bitnet", default="bitnet")
    parser.add_argument("--library", choices=LIBRARIES, default="xllamacpp")
    args = parser.parse_args()
    complete = LIBRARIES[args.library](args.exported)
    for prompt in PROMPTS:
        ours = engine(args.bitnet, args.model, prompt)
        theirs = complete(prompt)
        length = max(len(ours), len(theirs))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), length)
        print(f"{prompt!r}: {min(same, len(ours), len(theirs))} of {length} characters agree")
        if ours != theirs:
            print(f"  engine    {ours[same : same + 40]!r}\n  llama.cpp {theirs[same : same + 40]!r}")


if __name__ == "__main__":
    main()
