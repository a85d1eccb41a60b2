"""Make the small tokenizers in tests/assets.

    python scripts/make_test_assets.py [FOLDER]

One vocabulary of 2,000 tokens, trained on the sources of Python's standard library, in the two
forms that Llama 3 comes in: `test_tiktoken.model`, and a folder `tokenizer` with `tokenizer.json`
and `tokenizer_config.json`. Both give a text the same ids, start and end token included. The same
version of Python makes the same files; another has other sources, and makes files as good.
"""

import base64
import json
import sys
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from torchtitan.data.tiktoken_model import PATTERN, special_tokens

VOCAB_SIZE = 2000
NUM_SPECIAL = 11
"""Those with a name of their own; tiktoken's file, which lists none, stands for all 256."""


def main(folder: Path) -> None:
    """Write the assets into `folder`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [file.read_text("utf-8", errors="replace") for file in sorted(library.glob("*.py"))]
    tokenizer = train(sources)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    write_tiktoken(tokenizer, folder / "test_tiktoken.model")
    names = special_tokens()[:NUM_SPECIAL]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer" / "tokenizer_config.json").write_text(text, encoding="utf-8")


def train(texts: list[str]) -> Tokenizer:
    """Pairs of bytes, merged within the pieces that Llama 3 splits text into."""
    # A piece that is a token is that token, whatever the merges would give, as in tiktoken.
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tiktoken(tokenizer: Tokenizer, file: Path) -> None:
    """The vocabulary as lines of a token in base64 and its rank."""
    bytes_of = byte_alphabet()
    lines = []
    for rank in range(tokenizer.get_vocab_size()):
        token = bytes(bytes_of[character] for character in tokenizer.id_to_token(rank))
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    file.write_text("".join(lines), encoding="ascii")


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Bytes that are visible characters of Latin-1 stand for themselves, others for the characters
    from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    return characters | {chr(0x100 + number): byte for number, byte in enumerate(hidden)}


if __name__ == "__main__":
    assets = Path(__file__).resolve().parent.parent / "tests" / "assets"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else assets
    main(target)
    print(f"wrote {target}/test_tiktoken.model and {target}/tokenizer/")
