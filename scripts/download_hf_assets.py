"""Files of a model from the Hugging Face hub: `torchtitan download --assets` by TorchTitan's name.

python scripts/download_hf_assets.py --repo_id meta-llama/Llama-3.1-8B --assets tokenizer
"""

import sys

from torchtitan.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--assets" not in arguments:
        arguments += ["--assets", "tokenizer"]
    sys.exit(main(["download", *arguments]))
