"""Write a small set of conversations for trying fine-tuning: orders in a made-up notation.

    python scripts/make_chat_data.py outputs/chat_data [--rows 400] [--parquet] [--pairs]

The user orders something in words, and the assistant answers in a notation that no model knows:
`#3 apple/red` for three red apples. `train` and `held_out` have no order in common. With --pairs a
row is one order with two answers: the rejected one has colour and thing the wrong way round.
"""

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
THINGS = ("apple", "chair", "lamp", "book", "cup", "hat", "key", "rope", "stone", "wheel")
COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey")
SYSTEM = "You write orders in our notation."
ASKS = ("I would like {}.", "Please note {}.", "{}, please.", "We need {}.")


def orders() -> list[tuple[str, str]]:
    """Every order in words and in the notation."""
    found = []
    for (word, count), thing, colour in product(COUNTS.items(), THINGS, COLOURS):
        plural = "" if count == 1 else "s"
        found.append((f"{word} {colour} {thing}{plural}", f"#{count} {thing}/{colour}"))
    return found


def conversations(pairs: list[tuple[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of one to three orders."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        messages = [{"role": "system", "content": SYSTEM}]
        for words, notation in generator.sample(pairs, generator.randint(1, 3)):
            ask = generator.choice(ASKS).format(words)
            messages += [
                {"role": "user", "content": ask[0].upper() + ask[1:]},
                {"role": "assistant", "content": notation},
            ]
        rows.append({"messages": messages})
    return rows


def preferences(pairs: list[tuple[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Orders with the right answer and one that is as long and wrong."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        words, notation = generator.choice(pairs)
        number, thing, colour = notation.replace("/", " ").split()
        ask = generator.choice(ASKS).format(words)
        rows.append(
            {
                "system": SYSTEM,
                "prompt": ask[0].upper() + ask[1:],
                "chosen": notation,
                "rejected": f"{number} {colour}/{thing}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=400, help="conversations to train on")
    parser.add_argument("--parquet", action="store_true", help="write Parquet instead of JSONL")
    parser.add_argument("--pairs", action="store_true", help="write pairs of answers")
    options = parser.parse_args()
    make = preferences if options.pairs else conversations
    pairs = orders()
    random.Random(0).shuffle(pairs)
    cut = len(pairs) * 9 // 10
    options.folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": (pairs[:cut], options.rows), "held_out": (pairs[cut:], options.rows // 10)}
    for seed, (name, (own, count)) in enumerate(parts.items()):
        rows = make(own, count, seed)
        if options.parquet:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, options.folder / f"{name}.parquet")
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (options.folder / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
