"""How long Python has been running here: a shell that waited before it does not count."""

import subprocess
import sys
import time


def uptime(code: str) -> float:
    code += "; from torchtitan.utils.host import *; print(seconds_since_start())"
    # As run_llama_train.sh does: the shell waits for an installation, and becomes Python.
    command = ["bash", "-c", 'sleep 0.4; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout)


def test_what_ran_before_python_does_not_count() -> None:
    began = time.monotonic()
    told = uptime("pass")
    assert 0 < told <= time.monotonic() - began - 0.4


def test_what_python_did_before_counts() -> None:
    assert uptime("import time\nwhile time.process_time() < 0.3: pass\n0") >= 0.3


def test_it_goes_on() -> None:
    assert uptime("from torchtitan.utils.host import *; import time; time.sleep(0.2)") >= 0.2
