"""Made-up questions for the tasks of `bitnet-eval tasks`, in the hub's schemas.

    python scripts/interop/task_items.py OUT --words README.md docs/*.md [--count 240] [--seed 1]

Writes OUT/TASK.jsonl for seven tasks and one of our own (OUT/own.toml), and OUT/yaml/TASK.yaml,
which makes lm-evaluation-harness read the same files with the prompts of its own tasks. The
words come from the texts given; the answers are drawn by lot, since only the choices of two
programs are compared. Some questions are longer than a small model's context, end in white
space, hold brackets or characters beyond ASCII, or have choices that are alike.
"""

import argparse
import json
import random
import re
from pathlib import Path

import yaml

# What the harness reads in place of its own data set.
INCLUDE = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}
# Those of them that name a test split.
TESTED = ("arc_easy", "arc_challenge", "openbookqa")
OWN = {
    "task": "own",
    "doc_to_text": "{{topic|upper}}: {{stem.strip()}} ->",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{keys.index(key)}}",
    "description": "Choose one.\n",
    "target_delimiter": " ",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    text = "\n".join(path.read_text() for path in args.words)
    words = sorted(set(re.findall(r"\w[\w'-]*", text)))
    rng = random.Random(args.seed)

    def phrase(low, high):
        chosen = [rng.choice(words) for _ in range(rng.randint(low, high))]
        if rng.random() < 0.1:
            chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(["naïve", "Größe", "→", "🦀"]))
        return " ".join(chosen)

    def science(stem):
        size = rng.choice([3, 4, 4, 4, 5])
        texts = [phrase(1, 6) for _ in range(size)]
        if rng.random() < 0.05:
            texts[1] = texts[0]
        labels = list("ABCDE"[:size]) if rng.random() < 0.8 else list("12345"[:size])
        choices = {"text": texts, "label": labels}
        return {"id": str(rng.random()), stem: phrase(4, 18), "choices": choices,
                "answerKey": rng.choice(labels)}

    def openbookqa():
        row = science("question_stem")
        row["question_stem"] += rng.choice(["", "", "", " ", "  ", "?"])
        return row

    def hellaswag():
        a = phrase(5, 20) + rng.choice([".", " [title] " + phrase(2, 4) + " [step] " + phrase(3, 9), ""])
        endings = [phrase(3, 12) + rng.choice([".", " [substeps] " + phrase(2, 4)]) for _ in range(4)]
        return {"ind": rng.randrange(9999), "activity_label": phrase(1, 3), "ctx_a": a,
                "ctx_b": rng.choice(["", "the MAN", phrase(1, 4)]), "endings": endings,
                "label": str(rng.randrange(4))}

    def winogrande():
        return {"sentence": f"{phrase(4, 14)} _ {phrase(3, 10)}.", "option1": phrase(1, 2),
                "option2": phrase(1, 2), "answer": rng.choice("12")}

    def piqa():
        return {"goal": phrase(3, 15), "sol1": phrase(3, 20), "sol2": phrase(3, 20),
                "label": rng.randrange(2)}

    def boolq():
        return {"question": phrase(4, 10), "passage": phrase(20, 160), "label": rng.randrange(2)}

    def own():
        keys = ["x", "y", "z"]
        return {"topic": phrase(1, 2), "stem": f" {phrase(3, 12)} ", "keys": keys,
                "options": [phrase(1, 5) for _ in keys], "key": rng.choice(keys)}

    makers = {
        "arc_easy": lambda: science("question"), "arc_challenge": lambda: science("question"),
        "hellaswag": hellaswag, "winogrande": winogrande, "piqa": piqa,
        "openbookqa": openbookqa, "boolq": boolq, "own": own,
    }
    (args.out / "yaml").mkdir(parents=True, exist_ok=True)
    import lm_eval.tasks

    tasks = Path(lm_eval.tasks.__file__).parent
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True}
               for m in ("acc", "acc_norm", "acc_bytes")]
    for name, make in makers.items():
        path = args.out / f"{name}.jsonl"
        rows = [json.dumps(make(), ensure_ascii=False) for _ in range(args.count)]
        path.write_text("\n".join(rows) + "\n")
        if name == "own":
            config = OWN | {"output_type": "multiple_choice"}
        else:
            config = {"include": str(tasks / INCLUDE[name])}
        # A name of its own: the harness would take the file for its task of that name.
        config |= {
            "task": f"local_{name}", "tag": None, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}},
            "training_split": None, "validation_split": "validation", "test_split": None,
            "fewshot_split": "validation", "fewshot_config": {"sampler": "first_n"},
            "metric_list": metrics[:1] if name == "winogrande" else metrics,
        }
        (args.out / "yaml" / f"{name}.yaml").write_text(yaml.safe_dump(config))
        # Examples by lot, with the splits that the harness' own task names: the question
        # itself is left out where it names no test split.
        config |= {"task": f"lot_{name}", "fewshot_split": None, "fewshot_config": None,
                   "test_split": "validation" if name in TESTED else None}
        (args.out / "yaml" / f"lot_{name}.yaml").write_text(yaml.safe_dump(config))
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in OWN.items())
    (args.out / "own.toml").write_text(toml + "\n")
    print(f"{args.count} questions for each of {', '.join(makers)}")


if __name__ == "__main__":
    main()
