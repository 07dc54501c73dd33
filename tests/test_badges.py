"""One repository slug, repeated in badges and addresses, rewritten by `make badges`."""

import re
import shutil
from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
badges = load("notebooks", "badges")


def test_every_address_names_the_one_slug():
    slug = badges.slug(ROOT)
    for path in badges.places(ROOT):
        text = path.read_text(encoding="utf-8")
        badge = re.findall(r"(?:colab\.research\.google\.com/github|mybinder\.org/v2/gh)/([\w.-]+/[\w.-]+)/", text)
        installed = re.findall(r"git\+https://github\.com/([\w.-]+/[\w.-]+)", text)
        assert {*badge, *installed} <= {slug}, path.name
        addresses = re.findall(r"https://[\w-]+\.github\.io/[\w.-]+/", text)
        assert set(addresses) <= {badges.site(slug)}, path.name
        assert slug in text, f"{path.name} does not name the repository"


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for path in badges.places(ROOT):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def test_rewrites_everything_and_back(copy):
    before = {path: path.read_bytes() for path in badges.places(copy)}
    old = badges.slug(copy)
    assert badges.rewrite(copy, "a-school/seg_course") == badges.places(copy)
    assert badges.slug(copy) == "a-school/seg_course"
    assert not any(old in path.read_text(encoding="utf-8") for path in badges.places(copy))
    assert "https://a-school.github.io/seg_course/" in (copy / "README.md").read_text()
    assert "git clone https://github.com/a-school/seg_course && cd seg_course" in (copy / "README.md").read_text()
    badges.rewrite(copy, old)
    assert {path: path.read_bytes() for path in badges.places(copy)} == before


@pytest.mark.parametrize("bad", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", "-a/b", "a/b.git"])
def test_bad_slug_changes_nothing(copy, bad):
    before = {path: path.read_bytes() for path in badges.places(copy)}
    with pytest.raises(ValueError, match="expected owner/name"):
        badges.rewrite(copy, bad)
    assert {path: path.read_bytes() for path in badges.places(copy)} == before


def test_a_release_is_installed_by_its_tag(copy):
    """The first cell installs the release, and the badges open its notebooks; back on the branch all is as before."""
    before = {path: path.read_bytes() for path in badges.places(copy)}
    version = re.search(r'^version = "(.+)"$', (copy / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert badges.pin(copy, f"v{version}") == badges.notebooks(copy)
    slug = badges.slug(copy)
    for path in badges.notebooks(copy):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"git\+https://[^\"\\]+", text) == [f"git+https://github.com/{slug}@v{version}"]
        opened = re.findall(rf"(?:research\.google\.com/github/{slug}/blob|mybinder\.org/v2/gh/{slug})/([\w.-]+)", text)
        assert set(opened) == {f"v{version}"} and len(opened) >= 2
    badges.rewrite(copy, "a-school/seg_course")  # a fork keeps the tag
    assert f"git+https://github.com/a-school/seg_course@v{version}" in badges.notebooks(copy)[0].read_text(encoding="utf-8")
    badges.rewrite(copy, slug)
    badges.pin(copy, "main")
    assert {path: path.read_bytes() for path in badges.places(copy)} == before


def test_only_the_tag_of_this_version(copy):
    before = {path: path.read_bytes() for path in badges.places(copy)}
    with pytest.raises(ValueError, match=r"tag 'v9\.9\.9'; expected v[\d.]+, the version in pyproject.toml, or main"):
        badges.pin(copy, "v9.9.9")
    assert {path: path.read_bytes() for path in badges.places(copy)} == before
