"""Does the notebooks' first cell work on Colab, and leave what is installed there alone?

    python benchmarks/colab.py --python python3.13 --folder colab_environment

Makes a virtual environment with the versions of tests/data/colab_packages.txt, and a folder that holds notebooks 00 and 03 and
nothing else. Their own first cells install the package, from the last commit of this clone in place of GitHub. Afterwards every
package that was there must be there in the same version, and both notebooks must have run to their ends. torch comes from the
package index, some gigabytes; the environment is kept and used again. Writes colab.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "tests" / "data" / "colab_packages.txt"
NOTEBOOKS = ("00_start_here", "03_dense_training")
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
print(next(o["text"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream").strip())
"""


def versions(python: Path) -> dict[str, str]:
    """Installed packages by name, as pip lists them."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    return dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.13")
    parser.add_argument("--folder", type=Path, default=Path("colab_environment"), help="where the environment is kept")
    options = parser.parse_args()
    folder = options.folder.resolve()
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        subprocess.run([options.python, "-m", "venv", folder / "env"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", PACKAGES], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "medseg_lite"], check=True)
    before = versions(python)

    # The notebooks install from GitHub; git is told to take this clone instead.
    address = next(line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if "Repository =" in line)
    environment = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    environment.pop("PYTHONPATH", None)
    content = folder / "content"
    content.mkdir(exist_ok=True)
    rows = []
    for name in NOTEBOOKS:
        (content / f"{name}.ipynb").write_bytes((ROOT / "notebooks" / f"{name}.ipynb").read_bytes())
        began = time.perf_counter()
        done = subprocess.run(
            [python, "-c", RUN, f"{name}.ipynb"], cwd=content, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        rows.append(f"| {name} | {(time.perf_counter() - began) / 60:.1f} min | {done.stdout.strip().splitlines()[-1]} |")
        print(rows[-1])
    after = versions(python)
    changed = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    new = {name: version for name, version in after.items() if name not in before}
    if changed or set(new) != {"medseg_lite"}:
        sys.exit(f"the setup cell changed {changed} and added {new}; expected medseg_lite to be added and nothing changed")
    listed = ", ".join(line.replace("==", " ") for line in PACKAGES.read_text().splitlines() if "==" in line)
    text = f"""# On Colab's packages

`python benchmarks/colab.py`, {date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores, no GPU. Python {python_version(python)} with Colab's versions of
2026-08: {listed}. {len(before)} packages in all.

The notebooks' first cells, unchanged, installed medseg_lite {new["medseg_lite"]} and **changed no other package**. Then both notebooks ran to their ends:

| notebook | time, installing included | what it printed first |
|---|---|---|
{chr(10).join(rows)}

Not tried: Colab itself, its GPU, and how its pages show the widgets.
"""
    (Path(__file__).parent / "colab.md").write_text(text, encoding="utf-8")


def python_version(python: Path) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
