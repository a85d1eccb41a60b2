"""Write docs/config.md from the config's sections: python scripts/make_config_docs.py"""

from pathlib import Path

from torchtitan.tools.config_words import reference

if __name__ == "__main__":
    page = Path(__file__).resolve().parent.parent / "docs" / "config.md"
    page.write_text(reference(), encoding="utf-8")
    print(f"wrote {page}")
