# make_tokenizer.py
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

rows = [json.loads(line) for line in open("outputs/chat_data/train.jsonl")]
texts = [message["content"] for row in rows for message in row["messages"]]

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=512,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|im_start|>", "<|im_end|>"],
    show_progress=False,
)
tokenizer.train_from_iterator(texts, trainer)

folder = Path("outputs/tokenizer")
folder.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
print(tokenizer.get_vocab_size(), "tokens:", *tokenizer.encode("We need six grey wheels.").tokens)
