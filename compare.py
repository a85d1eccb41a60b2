# compare.py
import json


def losses(run):
    rows = map(json.loads, open(f"outputs/{run}/metrics.jsonl"))
    return {(row["step"], name): row[name] for row in rows for name in NAMES if name in row}


NAMES = ("loss", "validation/loss")
first, second = losses("first"), losses("second")
for step, name in first:
    print(f"{step:3} {name:15} {first[step, name]:.4f} {second[step, name]:.4f}")
