"""Runs the CPU property tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/run_sanitized.py [--cases N]

Builds into build/sanitize. The exit status is that of the tests; a report of a sanitizer ends them with another than 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"


def runtime(name: str) -> str:
    """The path of one of the compiler's runtime libraries, to be loaded before Python."""
    compiler = os.environ.get("CXX", "g++")
    path = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"run_sanitized: {compiler} brings no {name}; wanted a compiler with its sanitizers. Debian: apt install g++ libasan8 libubsan1.")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="cases of the property tests (default 400)")
    arguments = parser.parse_args()
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(BUILD), "-DFASTSNN_SANITIZE=ON", "-DFASTSNN_CUDA=OFF"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD), "--parallel", "2"], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep memory until the end; what matters is where the kernels read and write.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    library = BUILD / "lib" / "_fastsnn_cpu.so"
    tests = ["tests/test_properties.py", "tests/test_laws.py", "-k", "(cpu or threads) and not int32", f"--cases={arguments.cases}"]
    # -s: a report goes to the process's own stderr, past what pytest would hold back. No shrinking and no -x: a report ends the process by itself.
    command = [sys.executable, "-m", "pytest", *tests, f"--cpu-library={library}", "--hypothesis-profile=mutations", "-q", "-s", "-p", "no:cacheprovider"]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print("run_sanitized: clean" if status == 0 else f"run_sanitized: FAILED with status {status}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
