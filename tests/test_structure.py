"""The rules of CONTRIBUTING.md that can be read off the code: layers, private names, sizes, docstrings. Nothing is imported."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medseg_lite"
papers = load("notebooks", "papers")

FUNCTION_LINES, FILE_LINES = 60, 450
# First words that make a fragment of a docstring's first line; a verb in the imperative or a noun phrase makes a whole one.
FRAGMENTS = (
    "What Where How Which Whether Who Whose Why When While Of From Until Till Several As With Within Without "
    "By For To If Once That Because But And Or In On At Into"
).split()
# Objects whose attributes are part of a contract, so that nobody has to ask whether they exist.
CONTRACTS = re.compile(r"_?(model|networks?|net|members?|schedules?|optimizer|first|preprocessor|segmenter|subnets?)")
FRAMEWORK = re.compile(r"_(repr_\w+_|load_from_state_dict|save_to_state_dict|ipython_display_)$")


def report(offenders: list[str], rule: str) -> None:
    """Fail with the list of offenders."""
    if offenders:
        pytest.fail(f"{len(offenders)} {rule}\n  " + "\n  ".join(offenders), pytrace=False)


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(read(path))


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path, node: ast.AST | int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{node if isinstance(node, int) else node.lineno}"


# ------------------------------------------------------------------------------------------------------- imports


@cache
def modules() -> dict[str, Path]:
    """Return the file of each module of the package, by its name without "medseg_lite."; the package's own name is ""."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in files("medseg_lite")}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in names.items()}


def imports(module: str) -> list[tuple[str, str | None, str, ast.AST]]:
    """Return what a module imports from the package: (module, name in it or None, name here, node).

    Imports inside functions count too.
    """
    path, found = modules()[module], []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [(a.name, a.asname or a.name) for a in node.names if a.name.split(".")[0] == "medseg_lite"]
            found += [(name.partition(".")[2], None, here, node) for name, here in names]
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            parts = package.split(".") if package else []
            origin = ".".join([*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]).strip(".")
        elif (node.module or "").split(".")[0] == "medseg_lite":
            origin = node.module.partition(".")[2]
        else:
            continue
        for a in node.names:
            inner = f"{origin}.{a.name}".strip(".")
            found.append((inner, None, a.asname or a.name, node) if inner in modules() else (origin, a.name, a.name, node))
    return found


def test_no_cycle_between_modules():
    graph = {module: {target for target, *_ in imports(module)} - {module} for module in modules()}
    done, offenders = set(), []

    def walk(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            offenders.append(" → ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, (*way, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())
    report(offenders, "cycles of imports")


def layers() -> dict[str, int]:
    """Return the layer of each top-level module, as CONTRIBUTING.md lists them: "3. `models`, `optimizers`: …"."""
    page = read(ROOT / "CONTRIBUTING.md")
    section = page[page.index("### Layers") :].split("\n#")[0]
    lines = re.findall(r"^(\d+)\. ((?:`\w+`(?:, )?)+)", section, re.MULTILINE)
    names = [(name, int(number)) for number, listed in lines for name in re.findall(r"`(\w+)`", listed)]
    assert len(names) == len(dict(names)), "a module stands in two layers"
    return dict(names)


def test_every_module_has_a_layer():
    found = {module.split(".")[0] for module in modules()} - {"", "__main__"}
    assert found == set(layers()), "the layers of CONTRIBUTING.md and the modules of the package"


def test_imports_go_down_the_layers():
    layer, offenders = layers(), []
    for module, path in modules().items():
        here = module.split(".")[0]
        for target, _, _, node in imports(module):
            there = target.split(".")[0]
            if there and here != there and here in layer and layer[here] <= layer[there]:
                offenders.append(f"{place(path, node)}: {here} ({layer[here]}) imports {there} ({layer[there]})")
    report(offenders, "imports of a module that is not on a lower layer")


def test_no_module_uses_anothers_private_names():
    offenders = []
    for module, path in modules().items():
        aliases = {}
        for target, name, here, node in imports(module):
            if name is None:
                aliases[here] = target
            if name and re.match(r"_(?!_)", name):
                offenders.append(f"{place(path, node)}: {name} of {target}")
            elif re.match(r"_(?!_)", target.split(".")[-1]) and target.rpartition(".")[0].split(".")[0] != module.split(".")[0]:
                offenders.append(f"{place(path, node)}: the private module {target}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and ast.unparse(node.value) in aliases:
                offenders.append(f"{place(path, node)}: {node.attr} of {aliases[ast.unparse(node.value)]}")
    report(offenders, "private names of another module")


def names_used(path: Path) -> set[str]:
    """Return the names, attributes and texts of a file; a text may name a method."""
    nodes = list(ast.walk(tree(path)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {getattr(node, "id", None) or getattr(node, "attr", None) for node in nodes}


def test_every_private_function_is_used():
    offenders, everywhere = [], set().union(*map(names_used, files("medseg_lite")))
    for path in files("medseg_lite"):
        here = names_used(path)
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not re.match(r"_(?!_)", node.name):
                continue
            # A method may be used by another module's subclass, a function of the module only by the module itself.
            used = here if node in tree(path).body else everywhere
            if node.name not in used and not node.decorator_list and not FRAMEWORK.match(node.name):
                offenders.append(f"{place(path, node)}: {node.name}")
    report(offenders, "private functions that nothing uses")


# ---------------------------------------------------------------------------------------------- contracts and sizes


def test_nobody_asks_a_network_or_schedule_whether_it_has_an_attribute():
    offenders = []
    for path in files("medseg_lite"):
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
                and node.args
            ):
                name = ast.unparse(node.args[0]).split(".")[-1].split("[")[0]
                if CONTRACTS.fullmatch(name):
                    offenders.append(f"{place(path, node)}: {ast.unparse(node)}")
    report(offenders, "hasattr or getattr on a network, a schedule or an optimiser")


def lines_of_code(path: Path, node: ast.AST) -> int:
    """Return the number of lines of a function that are neither its docstring nor blank nor comments."""
    lines = read(path).splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node, clean=False) is not None:
        text = node.body[0]
        del lines[text.lineno - node.lineno : text.end_lineno - node.lineno + 1]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_functions_are_short():
    offenders = [
        f"{place(path, node)}: {node.name} has {lines_of_code(path, node)} lines"
        for path in files("medseg_lite", "benchmarks", "experiments")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and lines_of_code(path, node) > FUNCTION_LINES
    ]
    report(offenders, f"functions of more than {FUNCTION_LINES} lines")


def test_files_are_short():
    counts = {path: len(read(path).splitlines()) for path in files("medseg_lite", "benchmarks", "experiments")}
    report(
        [f"{place(path)}: {n} lines" for path, n in counts.items() if n > FILE_LINES], f"files of more than {FILE_LINES} lines"
    )


def test_the_formatter_knows_no_exceptions():
    offenders = [
        f"{place(path, number)}: {line.strip()}"
        for path in files("medseg_lite", "benchmarks", "experiments", "tests", "notebooks")
        for number, line in enumerate(read(path).splitlines(), 1)
        if re.search(r"#\s*fmt:\s*(skip|off)", line)
    ]
    report(offenders, "exceptions from the formatter")


# ------------------------------------------------------------------------------------------------------ docstrings


def docstrings() -> list[tuple[Path, ast.AST, str]]:
    """Return every docstring of the package, with the node that it describes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        (path, node, ast.get_docstring(node))
        for path in files("medseg_lite")
        for node in ast.walk(tree(path))
        if isinstance(node, kinds)
    ]
    return [(path, node, text) for path, node, text in found if text]


def test_docstrings_begin_with_a_verb_or_a_noun():
    offenders = [
        f"{place(path, getattr(node, 'lineno', 1))}: {text.splitlines()[0]}"
        for path, node, text in docstrings()
        if re.split(r"\W", text, maxsplit=1)[0] in FRAGMENTS
    ]
    report(offenders, "docstrings that begin with a question word or a preposition")


def test_lines_of_arguments_make_sense_alone():
    offenders = [
        f"{place(path, getattr(node, 'lineno', 1))}: {line.strip()}"
        for path, node, text in docstrings()
        for line in text.splitlines()
        if re.match(r" +\*{0,2}\w+(, \*{0,2}\w+)*: (of|from|until|for which|whose) ", line)
    ]
    report(offenders, "arguments described by a preposition")


@cache
def entries() -> list:
    return list(papers.entries(ROOT))


@cache
def text_of_notebooks() -> dict[str, str]:
    cells = {number: cells for number, (_, cells) in papers.lessons(ROOT).items()}
    return {number: "\n".join("".join(cell["source"]) for cell in found) for number, found in cells.items()}


def test_every_source_names_its_paper():
    offenders = [
        f"{place(ROOT / e.path, e.line)}: {e.name}: {e.source[:70]}"
        for e in entries()
        if "Source:" in e.text and re.match(r"(section|eq|figure|table|appendix)", e.source, re.IGNORECASE)
        if not re.match(r".*? of [A-Z]", e.source)
    ]
    report(offenders, "sources that begin with a place and do not name the paper")


def test_docstrings_lead_to_the_notebooks():
    offenders = []
    for e in entries():
        if "." in e.name and papers.citations(e.source) and not e.taught:
            found = [number for number, text in text_of_notebooks().items() if e.pattern.search(text)]
            if found:
                offenders.append(f"{place(ROOT / e.path, e.line)}: {e.name} is mentioned in {', '.join(found)}")
    report(offenders, 'docstrings with a source, mentioned in a notebook, without "Taught in notebook"')


def test_docstrings_name_notebooks_that_mention_them():
    offenders = []
    for e in entries():
        where = f"{place(ROOT / e.path, e.line)}: {e.name}"
        if "Taught in" in e.text and not e.taught:
            offenders.append(f'{where}: write "Taught in notebook 07." or "Taught in notebooks 07 and 15."')
        for number in e.taught:
            text = text_of_notebooks().get(number, "")
            if not e.pattern.search(text) and not re.search(rf"\b{e.name.split('.')[-1]}\b", text, re.IGNORECASE):
                offenders.append(f"{where} is not mentioned in notebook {number}")
    report(offenders, "wrong notebooks")


# ------------------------------------------------------------------------------------------------- versions, workflows


def test_one_version_everywhere():
    found = {
        "pyproject.toml": re.search(r'^version = "(.*)"$', read(ROOT / "pyproject.toml"), re.MULTILINE),
        "medseg_lite/__init__.py": re.search(r'^__version__ = "(.*)"$', read(PACKAGE / "__init__.py"), re.MULTILINE),
        "CITATION.cff": re.search(r"^version: (.*)$", read(ROOT / "CITATION.cff"), re.MULTILINE),
        "CHANGELOG.md": re.search(r"^## (\d\S*)", read(ROOT / "CHANGELOG.md"), re.MULTILINE),
    }
    assert len({match and match[1] for match in found.values()}) == 1, {
        name: match and match[1] for name, match in found.items()
    }


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows(path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(read(path))
    assert workflow["name"] and workflow[True], "YAML reads the key `on` as true"
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), (
                "official actions, at a major version"
            )
    targets = re.findall(r"\bmake ([\w-]+)", read(path))
    missing = [t for t in targets if not re.search(rf"^{t}:", read(ROOT / "Makefile"), re.MULTILINE)]
    assert targets and set(missing) <= {"site"}, "the Makefile lacks a target that a workflow makes"
