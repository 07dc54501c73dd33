"""The notebooks' first cell on Colab's package versions: it must work, and leave what is installed there alone.

    python benchmarks/colab.py --python python3.13 --folder colab_environment

Makes a virtual environment with the versions of tests/data/colab_packages.txt, and a folder that holds notebooks 00 and 04 and
nothing else. Their own first cells install the package, from the last commit of this clone in place of GitHub. Afterwards every
package that was there must be there in the same version, and both notebooks must have run to their ends. torch comes from the
package index, some gigabytes; the environment is kept and used again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from _measure import fill, markdown, options

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "tests" / "data" / "colab_packages.txt"
NOTEBOOKS = ("00_start_here", "04_dense_training")
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
print(next(o["text"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream").strip())
"""


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the installed packages by name, as pip lists them."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    return dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)


def make_environment(base: str, folder: Path) -> Path:
    """Return the Python of an environment with Colab's versions and without this package."""
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder / "env"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", PACKAGES], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "medseg_lite"], check=True)
    return python


def run_notebooks(python: Path, folder: Path) -> pd.DataFrame:
    """Run the notebooks in an empty folder; return their minutes and the first lines that they print."""
    # The notebooks install from GitHub; git is told to take this clone instead.
    address = next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text("utf-8").splitlines() if "Repository =" in line
    )
    environment = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    environment.pop("PYTHONPATH", None)
    folder.mkdir(exist_ok=True)
    rows = []
    for name in NOTEBOOKS:
        (folder / f"{name}.ipynb").write_bytes((ROOT / "notebooks" / f"{name}.ipynb").read_bytes())
        began = time.perf_counter()
        command = [python, "-c", RUN, f"{name}.ipynb"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        rows.append([name, f"{(time.perf_counter() - began) / 60:.1f} min", done.stdout.strip().splitlines()[-1]])
        print(*rows[-1])
    return pd.DataFrame(rows, columns=["notebook", "time, installing included", "first printed line"])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", default="python3.13")
    parser.add_argument("--folder", type=Path, default=Path("colab_environment"), help="place of the environment")
    given = parser.parse_args()
    python = make_environment(given.python, given.folder.resolve())
    before = versions(python)
    table = run_notebooks(python, given.folder.resolve() / "content")
    after = versions(python)
    changed = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    new = {name: version for name, version in after.items() if name not in before}
    if changed or set(new) != {"medseg_lite"}:
        sys.exit(f"the setup cell changed {changed} and added {new}; expected medseg_lite to be added and nothing changed")
    code = "import platform; print(platform.python_version())"
    number = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    listed = ", ".join(line.replace("==", " ") for line in PACKAGES.read_text("utf-8").splitlines() if "==" in line)
    about = f", {os.cpu_count()} CPU cores, no GPU. Python {number} with Colab's versions of 2026-08: {listed}. {len(before)} packages in all. "
    about += f"medseg_lite {new['medseg_lite']} was installed"
    fill(__file__, given.results, about, {"notebooks": markdown(table)})


if __name__ == "__main__":
    main()
