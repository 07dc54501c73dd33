"""Point every badge and address at another repository, for forks and course copies. `make badges REPO=owner/name` calls this.

    python notebooks/badges.py owner/name
    python notebooks/badges.py --tag v0.2.0    # in the commit of a release; --tag main goes back

The slug stands in pyproject.toml (`Repository`). The notebooks, README.md and CITATION.cff repeat it, and the address of the site,
which follows from it. With a tag the notebooks' first cells install that release, and their badges open its notebooks. The tag
must be on GitHub before anybody opens them, so the branch main is what they name otherwise.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SLUG = r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+"
BRANCH = "main"


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


def notebooks(root: Path) -> list[Path]:
    """Return the notebooks of the course."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def places(root: Path) -> list[Path]:
    """The files that name the repository."""
    names = ("README.md", "CITATION.cff", "pyproject.toml")  # pyproject.toml last: a run cut short can be repeated
    return [*notebooks(root), *(root / name for name in names)]


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
        changed += write(path, before, after)
    return changed


def pin(root: Path, tag: str) -> list[Path]:
    """Let the first cells of the notebooks install a release, and their badges open its notebooks.

    Args:
        root: root of the repository.
        tag: tag of the release in pyproject.toml, such as "v0.2.0"; or "main", for the newest state of that branch.

    Returns:
        The notebooks that changed.
    """
    version = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text("utf-8"), re.M)[1]
    if tag not in (BRANCH, f"v{version}"):
        raise ValueError(f"tag {tag!r}; expected v{version}, the version in pyproject.toml, or {BRANCH}")
    name, changed, ref = re.escape(slug(root)), [], r"[\w.-]+"
    for path in notebooks(root):
        before = path.read_text(encoding="utf-8")
        installed = rf"\1@{tag}" if tag != BRANCH else r"\1"
        after = re.sub(rf"(git\+https://github\.com/{name})(?:@{ref})?", installed, before)
        after = re.sub(rf"(/github/{name}/blob/){ref}(/notebooks/)", rf"\g<1>{tag}\2", after)
        after = re.sub(rf"(mybinder\.org/v2/gh/{name}/){ref}", rf"\g<1>{tag}", after)
        changed += write(path, before, after)
    return changed


def write(path: Path, before: str, after: str) -> list[Path]:
    """Write a file that changes, and return it in a list; the list is empty where nothing changes."""
    if after == before:
        return []
    with atomic_write(path) as temporary:
        temporary.write_text(after, encoding="utf-8")
    return [path]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("repository", nargs="?", help="owner/name")
    what.add_argument("--tag", help="v and the version in pyproject.toml, or main")
    given = parser.parse_args()
    try:
        for path in pin(ROOT, given.tag) if given.tag else rewrite(ROOT, given.repository):
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(str(error))
