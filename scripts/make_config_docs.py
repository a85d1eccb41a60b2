"""Write docs/config.md, and the tables of docs/from_torchtitan.md, from the code they describe:
python scripts/make_config_docs.py"""

from pathlib import Path

from torchtitan.commands.config import reference
from torchtitan.config.compat.reference import with_tables

if __name__ == "__main__":
    docs = Path(__file__).resolve().parent.parent / "docs"
    page = docs / "config.md"
    page.write_text(reference(), encoding="utf-8")
    print(f"wrote {page}")
    page = docs / "from_torchtitan.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {page}")
