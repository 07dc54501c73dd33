"""Point every badge and address at another repository, for forks and course copies. `make badges REPO=owner/name` calls this.

The slug stands in pyproject.toml (`Repository`). The notebooks, README.md and CITATION.cff repeat it, and the address of the site,
which follows from it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SLUG = r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+"


def slug(root: Path) -> str:
    """The repository, "owner/name", that pyproject.toml names."""
    found = re.search(rf'^Repository = "https://github.com/({SLUG})"$', (root / "pyproject.toml").read_text("utf-8"), re.M)
    if not found:
        raise ValueError(f'{root / "pyproject.toml"} has no line Repository = "https://github.com/owner/name"')
    return found[1]


def site(slug: str) -> str:
    """Return the address at which GitHub Pages shows the site of a repository."""
    owner, name = slug.split("/")
    return f"https://{owner.lower()}.github.io/{name}/"


def places(root: Path) -> list[Path]:
    """The files that name the repository."""
    names = ("README.md", "CITATION.cff", "pyproject.toml")  # pyproject.toml last: a run cut short can be repeated
    return [*sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")), *(root / name for name in names)]


def rewrite(root: Path, new: str) -> list[Path]:
    """Replace the slug everywhere; the files that changed."""
    if not re.fullmatch(SLUG, new) or new.endswith((".", ".git")):
        raise ValueError(f"REPO={new!r}; expected owner/name as in github.com/owner/name")
    old, changed = slug(root), []
    for path in places(root):
        before = path.read_text(encoding="utf-8")
        after = re.sub(rf"\b{re.escape(old)}(?![\w-])", new, before)
        after = after.replace(site(old), site(new))
        after = after.replace(f"{new} && cd {old.split('/')[1]}", f"{new} && cd {new.split('/')[1]}")
        if after != before:
            with atomic_write(path) as temporary:
                temporary.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="owner/name")
    try:
        for path in rewrite(ROOT, parser.parse_args().repository):
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(str(error))
