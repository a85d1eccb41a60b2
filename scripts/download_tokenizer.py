"""A model's tokenizer from the Hugging Face hub: `torchtitan download` by TorchTitan's name.

python scripts/download_tokenizer.py --repo_id meta-llama/Meta-Llama-3-8B --tokenizer_path original
"""

import sys

from torchtitan.cli import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
