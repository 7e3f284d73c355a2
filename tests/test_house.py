"""The shape of the repository: the order of notebooks, modules, lines, imports and sentences."""

import ast
import importlib
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from notebook_graph import (
    PACKAGE,
    ROOT,
    Modules,
    Notebook,
    all_notebooks,
    definitions,
    files_below,
    in_reading_order,
    modules_read,
    own_module_uses,
    top_level,
)

WIDTH = 110
OFFERED = [
    "OPRDTrainer",
    "OPRDConfig",
    "Representation",
    "FullKL",
    "SampledTokenKL",
    "Teacher",
    "Bridge",
    "ReadoutBridge",
    "HFSampler",
    "load_model",
    "load_tokenizer",
    "load_task",
    "evaluate",
    "embedded",
]
MODULES = Modules()


def listing(found: list[str], limit: int = 60) -> str:
    """An assertion message: how many, and the first of them, one per line."""
    shown = found[:limit] + ["..."] * (len(found) > limit)
    return "\n".join([f"{len(found)} found:", *shown])


def short(path: Path) -> str:
    """A path as it is written from the root of the repository."""
    return str(path.relative_to(ROOT))


# Notebooks and modules


def test_a_notebook_imports_only_from_notebooks_before_it():
    books = in_reading_order()
    place = {book.module: number for number, book in enumerate(books) if book.module}
    for package in MODULES.packages:
        inside = [place[module] for module in MODULES.below(package) if module in place]
        place.setdefault(package, min(inside, default=-1))
    wrong = []
    for number, book in enumerate(books):
        opening = {cell.number for cell in book.opening}
        for cell, reads in modules_read(book, MODULES).items():
            if cell in opening:
                continue
            late = [read for read in reads if place.get(read.module, len(books)) >= number]
            wrong += [f"nbs/{book.name} cell {cell}: {read.said}  ({read.module})" for read in late]
    assert not wrong, listing(wrong)


def test_examples_call_the_definitions_in_the_cells_above_them():
    wrong = []
    for book in in_reading_order():
        if book.module:
            uses = own_module_uses(book, MODULES)
            wrong += [f"nbs/{book.name} {use.module}, line {use.line}: {use.said}" for use in uses]
    assert not wrong, listing(wrong)


def test_every_module_has_exactly_one_notebook():
    owners = Counter(book.module for book in all_notebooks() if book.module)
    without = sorted(set(MODULES.files) - set(owners))
    missing = sorted(set(owners) - set(MODULES.files))
    twice = sorted(module for module, count in owners.items() if count > 1)
    wrong = [f"{module}: no notebook exports it" for module in without]
    wrong += [f"{module}: a notebook exports it, but the file is not there" for module in missing]
    wrong += [f"{module}: more than one notebook exports it" for module in twice]
    assert not wrong, listing(wrong)


def test_no_module_lies_next_to_a_package_of_the_same_name():
    wrong = [short(path) for path in MODULES.files.values() if path.with_suffix("").is_dir()]
    assert not wrong, listing(wrong)


def test_no_package_offers_a_name_that_one_of_its_modules_bears():
    # After `import package.name` the attribute `package.name` is the module, and no longer what was offered.
    wrong = []
    for package in MODULES.packages:
        offered = importlib.import_module(package).__dict__.get("__all__", [])
        wrong += [
            f"{package} offers {name}, and has {name}.py"
            for name in offered
            if f"{package}.{name}" in MODULES
        ]
    assert not wrong, listing(wrong)


# Classes


def test_no_method_is_assigned_from_outside_its_class():
    trees = {name: MODULES.trees[name] for name in MODULES.files}
    classes = {
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    wrong = []
    for name, tree in trees.items():
        for node in top_level(tree):
            wrong += [f"{name}, line {node.lineno}: {said}" for said in outside_assignments(node, classes)]
    assert not wrong, listing(wrong)


def outside_assignments(node: ast.stmt, classes: set[str]) -> list[str]:
    """`Class.name = ...`, `setattr(Class, ...)` and `@patch` in one statement."""
    targets = []
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        written = node.targets if isinstance(node, ast.Assign) else [node.target]
        leaves = [leaf for target in written for leaf in ast.walk(target)]
        targets = [leaf.value for leaf in leaves if isinstance(leaf, ast.Attribute)]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if getattr(node.value.func, "id", "") == "setattr":
            targets = node.value.args[:1]
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(re.match(r"(\w+\.)?patch(_to)?\b", decorator) for decorator in decorators):
            return [f"@patch def {node.name}"]
    on_a_class = [target for target in targets if isinstance(target, ast.Name) and target.id in classes]
    return [ast.unparse(node).splitlines()[0]] if on_a_class else []


def functions_with_self(tree: ast.Module) -> dict[str, int]:
    """Functions outside of classes whose first argument is `self` or `cls`, with their lines."""
    functions = [node for node in top_level(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = {}
    for node in functions:
        arguments = [*node.args.posonlyargs, *node.args.args]
        if arguments and arguments[0].arg in ("self", "cls"):
            found[node.name] = node.lineno
    return found


def test_no_function_outside_a_class_takes_self():
    wrong = []
    for module in MODULES.files:
        functions = functions_with_self(MODULES.trees[module])
        wrong += [f"{module}, line {line}: def {name}" for name, line in functions.items()]
    assert not wrong, listing(wrong)


def exported_names(tree: ast.Module) -> list[str]:
    """The names in a module's `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_no_method_stands_in_a_module_s_all():
    wrong = []
    for module in MODULES.files:
        tree = MODULES.trees[module]
        methods = functions_with_self(tree)
        unbound = set(exported_names(tree)) - definitions(tree)
        listed = [name for name in exported_names(tree) if name in methods or name in unbound]
        wrong += [f"{module}: {name}" for name in listed]
    assert not wrong, listing(wrong)


# Lines and cells

LINK = r"<?https?://\S+>?|!?\[[^\]]*\]\([^)]*\)|\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)"
LINK_ALONE = re.compile(rf"\s*([-*] )?({LINK}|\[[^\]]+\]:\s*\S+)[.,;:]?\s*")


def code_lines(path: Path) -> list[tuple[int, str]]:
    """The numbered lines of a Python file that a person wrote: no cell markers, no generated `__all__`."""
    lines = list(enumerate(path.read_text().splitlines(), 1))
    if not any("AUTOGENERATED" in line for _, line in lines[:8]):
        return lines
    kept, in_all = [], False
    for number, line in lines:
        in_all = in_all or line.startswith("__all__ = [")
        if not in_all and not line.startswith("# %% "):
            kept.append((number, line))
        if line.rstrip().endswith("]"):
            in_all = False
    return kept


def prose_lines(text: str) -> list[tuple[int, str]]:
    """The numbered lines of Markdown that can be broken: no table rows, no links alone on their line."""
    lines = enumerate(text.splitlines(), 1)
    return [(n, line) for n, line in lines if not line.startswith("|") and not LINK_ALONE.fullmatch(line)]


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository, without the cards of runs that notebooks made."""
    below = [ROOT / name for name in ("nbs", "examples", "tests", "tools", "docs")]
    nested = [path for folder in below for path in files_below(folder, ".md") if "runs" not in path.parts]
    return [*sorted(ROOT.glob("*.md")), *nested]


def python_files() -> list[Path]:
    """Every Python file of the repository but the generated index."""
    below = [ROOT / name for name in (PACKAGE, "tests", "examples", "tools")]
    nested = [path for folder in below for path in files_below(folder, ".py")]
    return [path for path in [*sorted(ROOT.glob("*.py")), *nested] if path.name != "_modidx.py"]


def too_long(where: str, lines: list[tuple[int, str]]) -> list[str]:
    """The places of lines over the width."""
    return [f"{where}, line {number}: {len(line)} columns" for number, line in lines if len(line) > WIDTH]


def test_no_line_of_code_is_wider_than_110_columns():
    wrong = [place for path in python_files() for place in too_long(short(path), code_lines(path))]
    assert not wrong, listing(wrong)


def test_no_line_of_a_notebook_is_wider_than_110_columns():
    wrong = []
    for book in all_notebooks():
        for cell in book.cells:
            every = list(enumerate(cell.source.splitlines(), 1))
            lines = every if cell.kind == "code" else prose_lines(cell.source)
            wrong += too_long(f"nbs/{book.name} cell {cell.number}", lines)
    assert not wrong, listing(wrong)


def test_no_line_of_a_markdown_file_is_wider_than_110_columns():
    wrong = [
        place for path in markdown_files() for place in too_long(short(path), prose_lines(path.read_text()))
    ]
    assert not wrong, listing(wrong)


def test_ruff_refuses_lines_over_110_columns():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    lint = ruff["lint"]
    assert ruff["line-length"] == WIDTH
    assert lint.get("pycodestyle", {}).get("max-line-length", WIDTH) == WIDTH
    assert {"E", "E5", "E501"} & set(lint["select"])
    assert not {"E", "E5", "E501"} & {*lint.get("ignore", []), *lint.get("extend-ignore", [])}
    per_file = lint.get("per-file-ignores", {})
    ignored = [pattern for pattern, rules in per_file.items() if {"E", "E5", "E501"} & set(rules)]
    # nbdev generates the package from the notebooks, which ruff reads too: only there may the rule be off.
    assert all(pattern.startswith(f"{PACKAGE}/") for pattern in ignored), ignored
    excluded = [*ruff.get("exclude", []), *ruff.get("extend-exclude", [])]
    assert not any(pattern.startswith(("nbs", "tests", "examples", "*.ipynb")) for pattern in excluded), (
        excluded
    )


def cell_lines(source: str) -> int:
    """How many lines a cell has, its directives included."""
    return len(source.strip().splitlines())


def test_half_of_the_exported_cells_have_at_most_15_lines():
    lengths = [cell_lines(cell.source) for book in all_notebooks() for cell in book.exported]
    assert statistics.median(lengths) <= 15, (
        f"median of {len(lengths)} exported cells: {statistics.median(lengths)}"
    )


def without_example(book: Notebook) -> tuple[list[str], int]:
    """The exported cells with no example before the next one, and how many exported cells there are."""
    bare, count, waiting = [], 0, None
    for cell in book.code:
        if cell.is_exported:
            bare += [waiting] if waiting else []
            waiting = None
            if not cell.only_imports:
                count += 1
                waiting = f"nbs/{book.name} cell {cell.number}: {', '.join(sorted(cell.defines))}"
        elif cell.tree.body and not cell.only_imports:
            waiting = None
    return bare + ([waiting] if waiting else []), count


def test_four_of_five_exported_cells_are_followed_by_an_example():
    counted = [without_example(book) for book in all_notebooks()]
    bare = [place for places, _ in counted for place in places]
    total = sum(count for _, count in counted)
    share = 1 - len(bare) / total
    assert share >= 0.8, (
        f"{share:.1%} of {total} exported cells have an example; without:\n{listing(bare, 200)}"
    )


# What an import brings along


def loaded_after(statements: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after these statements."""
    program = f"{statements}\nimport sys\nprint('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.split("LOADED")[-1].split())


def command(arguments: list[str]) -> str:
    """A program that runs the command line and goes on when it exits with 0."""
    return f"""
from oprd_nb.cli import main
try:
    status = main({arguments!r})
except SystemExit as exit:
    status = exit.code
assert not status, status
"""


def test_the_package_is_cheap_to_import():
    assert not loaded_after("import oprd_nb") & {"torch", "transformers", "trl", "peft", "pandas", "plotly"}


def test_training_probing_and_bridge_bring_no_widget_and_no_plotting_library():
    packages = [f"{PACKAGE}.{name}" for name in ("training", "probing", "bridge")]
    inside = [module for package in packages for module in MODULES.below(package)]
    assert {package for package in packages if MODULES.below(package)} == set(packages)
    program = f"""
import sys
from importlib import import_module
unwanted = {{"plotly", "ipywidgets", "anywidget", "kaleido", "matplotlib"}}
for module in {inside!r}:
    import_module(module)
    brought = unwanted & set(sys.modules)
    assert not brought, f"{{module}} brings {{brought}}"
"""
    loaded_after(program)


def test_training_lies_in_trainer_and_experiment():
    assert {f"{PACKAGE}.training.trainer", f"{PACKAGE}.training.experiment"} <= set(MODULES.files)


def test_help_imports_no_model_library():
    loaded = loaded_after(command(["--help"]))
    assert not loaded & {"torch", "trl", "peft", "plotly", "ipywidgets"}


def test_help_of_report_imports_no_trainer_and_no_widget():
    loaded = loaded_after(command(["report", "--help"]))
    assert not loaded & {"trl", "peft", "ipywidgets", "anywidget"}


@pytest.mark.parametrize("name", OFFERED)
def test_the_package_offers(name):
    assert not isinstance(getattr(importlib.import_module(PACKAGE), name), types.ModuleType)


@pytest.mark.parametrize("package", sorted(set(MODULES.packages) - {PACKAGE}))
def test_every_name_that_a_package_offers_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert not isinstance(getattr(module, name), types.ModuleType), f"{package}.{name}"


# Sentences

HOUSE_WORDS = re.compile(r"\b(rooms?|floors?|twins?|seal(s|ed|ing)?)\b", re.IGNORECASE)
ROUNDING = re.compile(r"(math|torch|np|numpy)\.floor|\.floor\(|\bfloor(\(|[ -]division)|\\[lr]?floor\b")
UNITS = (
    "token|row|layer|step|second|problem|prompt|response|seed|offset|position|rollout|pair|model|micro-batch|"
    "process|label|batch|sample|minute|run|method|metric|teacher|student|parameter|rank|message"
)
COUNTED = (
    "bytes|nats|tokens|rows|responses|prompts|seconds|steps|lines|numbers|problems|positions|samples|strokes|"
    "pairs|answers|draws|rollouts|values|vectors|points|processes|minutes|ticks|records|objects|"
    "gradients|metrics"
)
# Not the distributive "a": "one needs a model"; "all responses a process samples".
NO_NOUN = (
    "has|needs|is|was|makes|gives|takes|reads|sees|in|as|of|to|for|from|with|and|or|at|by|on|than|then|such"
)
CLAUSE = "of tokenizers|has|have|is|was|does|can|may|reads|writes|needs|holds|keeps|gives|samples|leaves|less"
PER = re.compile(
    rf"\b(?i:(one( (?!({NO_NOUN})\b)[\w-]+)?|\d+ \w+s|{COUNTED}))"
    rf" an? (optimizer |student |teacher |response )?({UNITS})\b(?! ({CLAUSE}))"
)


def strings_and_comments(source: str) -> Iterator[str]:
    """The string constants of a piece of code that are sentences and not keys, and its comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\s", node.value):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def without_code(markdown: str) -> str:
    """Markdown with its code blocks and code spans taken out."""
    return re.sub(r"`[^`\n]*`", "`...`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


def passages() -> Iterator[tuple[str, str]]:
    """(place, text) of everything a reader is told: prose, docstrings, messages, comments."""
    for book in all_notebooks():
        for cell in book.cells:
            place = f"nbs/{book.name} cell {cell.number}"
            if cell.kind == "markdown":
                yield place, without_code(cell.source)
            elif cell.kind == "code":
                yield from ((place, text) for text in strings_and_comments(ast.unparse(cell.tree)))
                comments = re.findall(r"#[^|\n].*", cell.source)
                yield from ((place, text) for text in comments)
    for path in python_files():
        if path.is_relative_to(ROOT / "examples") or path.name in ("__init__.py", "__main__.py"):
            yield from ((short(path), text) for text in strings_and_comments(path.read_text()))
    for path in markdown_files():
        if path.name != "CHANGELOG.md":
            yield short(path), without_code(path.read_text())


def hits(pattern: re.Pattern) -> list[str]:
    """Every match in the repository's prose, with its place and the words around it."""
    found = []
    for place, text in passages():
        flat = re.sub(r"\s+", " ", ROUNDING.sub("", text).replace("\n\n", " \u00b6 "))
        for match in pattern.finditer(flat):
            around = flat[max(0, match.start() - 30) : match.end() + 30]
            found.append(f"{place}: ...{around}...")
    return sorted(set(found))


def test_prose_has_no_house_words():
    found = hits(HOUSE_WORDS)
    assert not found, listing(found, 300)


def test_prose_says_per_and_not_a():
    found = hits(PER)
    assert not found, listing(found, 300)


def test_no_name_in_the_package_is_undefined():
    """ruff's F821 is off in pyproject.toml, since it takes jaxtyping's dimension names for Python names."""
    command = ["ruff", "check", "oprd_nb", "--isolated", "--select", "F821", "--output-format", "json"]
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    wrong = []
    for found in json.loads(result.stdout):
        path = Path(found["filename"])
        row = found["location"]["row"]
        column = found["location"]["column"]
        inside_a_string = path.read_text().splitlines()[row - 1][: column - 1].count('"') % 2 == 1
        if not inside_a_string:
            wrong.append(f"{short(path)}:{row}: {found['message']}")
    assert not wrong, listing(wrong)
