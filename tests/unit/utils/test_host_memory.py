"""The memory that is left, read from files as Linux writes them."""

from pathlib import Path

from torchtitan.utils.host import available_bytes


def test_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:    3000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 100\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000\n")
    assert available_bytes(meminfo, tmp_path) == 2000 - 500 + 100
    (tmp_path / "memory.max").write_text("100\n")
    assert available_bytes(meminfo, tmp_path) == 0


def test_unknown(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None
    (tmp_path / "odd").write_text("no colon here")
    assert available_bytes(tmp_path / "odd", tmp_path) is None
