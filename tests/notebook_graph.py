"""What the notebooks define and import, read from their source alone; the package itself is not imported."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "nbs"
PACKAGE = "oprd_nb"

GENERATED_FOLDERS = {"_proc", "__pycache__", "results"}
NOT_EXPORTED = {"__init__.py", "__main__.py", "_modidx.py"}
EXPORTS = {"export", "exports", "exporti"}
DIRECTIVE = re.compile(r"^#\s*\|\s*(\w+)[ \t]*(.*)$", re.MULTILINE)
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)


def files_below(folder: Path, suffix: str) -> list[Path]:
    """All files with this suffix below `folder`, sorted; hidden and generated folders are left out."""

    def kept(path: Path) -> bool:
        folders = path.relative_to(folder).parts[:-1]
        return not any(name in GENERATED_FOLDERS or name.startswith(".") for name in folders)

    return sorted(path for path in folder.rglob(f"*{suffix}") if kept(path))


def parsed(source: str) -> ast.Module:
    """The syntax tree of a cell; lines that only IPython understands become `pass`."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(MAGIC.sub(r"\1pass", source))


def top_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements outside functions and classes, those inside `if`, `try`, `with` and loops included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            yield from top_level(node)


def definitions(tree: ast.AST) -> set[str]:
    """Names bound at the top level by `def`, `class` or an assignment; imports are not definitions."""
    names = set()
    for node in top_level(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            names |= {leaf.id for leaf in leaves if isinstance(leaf.ctx, ast.Store)}
    return names


class Modules:
    """The modules of the package: which names each defines, and what each package's `__init__.py` offers."""

    def __init__(self, root: Path = ROOT):
        self.files: dict[str, Path] = {}
        self.packages: dict[str, Path] = {}
        for path in files_below(root / PACKAGE, ".py"):
            parts = path.relative_to(root).with_suffix("").parts
            if path.name == "__init__.py":
                self.packages[".".join(parts[:-1])] = path
            elif path.name not in NOT_EXPORTED:
                self.files[".".join(parts)] = path

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """The syntax tree of each module and of each package's `__init__.py`."""
        return {name: ast.parse(path.read_text()) for name, path in (self.files | self.packages).items()}

    @cached_property
    def names(self) -> dict[str, set[str]]:
        """The names that each module, and each `__init__.py`, defines at its top level."""
        return {name: definitions(tree) for name, tree in self.trees.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.packages

    def below(self, package: str) -> list[str]:
        """The modules inside a package, at any depth."""
        return [name for name in self.files if name.startswith(package + ".")]

    def defining(self, owner: str, name: str) -> list[str]:
        """The modules that define what `from owner import name` gives; re-exports are followed."""
        if f"{owner}.{name}" in self:
            return [f"{owner}.{name}"]
        if owner in self.files:
            return [owner]
        if owner not in self.packages:
            return []
        for source in [*self._imported_from(owner, name), *self._listed_under(owner, name)]:
            if source in self and source != owner:
                return self.defining(source, name)
        if name in self.names[owner]:
            return [owner]
        return [module for module in self.below(owner) if name in self.names[module]]

    def _imported_from(self, package: str, name: str) -> Iterator[str]:
        """Where the `import` statements of a package's `__init__.py` take `name` from."""
        for node in ast.walk(self.trees[package]):
            if not isinstance(node, ast.ImportFrom):
                continue
            if name in {alias.asname or alias.name for alias in node.names}:
                yield f"{package}.{node.module}" if node.level else node.module

    def _listed_under(self, package: str, name: str) -> Iterator[str]:
        """Where a table in a lazy `__init__.py` takes `name` from: {module: names} or {name: module}."""
        for table in (node for node in ast.walk(self.trees[package]) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                listed = {leaf.value for leaf in ast.walk(value) if isinstance(leaf, ast.Constant)}
                if isinstance(key, ast.Constant) and name in listed:
                    yield from self._spelled(package, key.value)
                if isinstance(key, ast.Constant) and key.value == name:
                    yield from (full for text in listed for full in self._spelled(package, text))

    def _spelled(self, package: str, text: object) -> list[str]:
        """The modules that a string in `package` may mean."""
        relative = str(text).lstrip(".")
        meant = (f"{package}.{relative}", f"{PACKAGE}.{relative}", str(text))
        return [name for name in meant if name in self]


@dataclass(frozen=True)
class Read:
    """One use of the package: the module it needs (or a whole package) and the source that says so."""

    module: str
    line: int
    said: str


@dataclass
class Cell:
    """One cell of a notebook; `number` counts all cells from 0."""

    number: int
    kind: str
    source: str
    after_default_exp: bool

    @cached_property
    def directives(self) -> dict[str, str]:
        """nbdev's directives of this cell, name to argument."""
        return dict(DIRECTIVE.findall(self.source)) if self.kind == "code" else {}

    @property
    def is_exported(self) -> bool:
        """Whether nbdev writes this cell into the module."""
        return bool(EXPORTS & set(self.directives))

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a code cell."""
        return parsed(self.source)

    @property
    def defines(self) -> set[str]:
        """Names bound at the top level of this cell."""
        return definitions(self.tree)

    @property
    def only_imports(self) -> bool:
        """Whether the cell has no statement but imports."""
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in self.tree.body)


@dataclass
class Notebook:
    """A notebook as a list of cells, and the module that it exports (None where it exports nothing)."""

    path: Path
    cells: list[Cell]
    module: str | None

    @property
    def name(self) -> str:
        """Its path below `nbs`."""
        return str(self.path.relative_to(NOTEBOOKS))

    @property
    def code(self) -> list[Cell]:
        """Its code cells."""
        return [cell for cell in self.cells if cell.kind == "code" and cell.source.strip()]

    @property
    def exported(self) -> list[Cell]:
        """The code cells that make the module."""
        return [cell for cell in self.code if cell.is_exported]

    @property
    def opening(self) -> list[Cell]:
        """The code cells before `#| default_exp`: the opening picture, which may use the finished package."""
        return [cell for cell in self.code if self.module and not cell.after_default_exp]

    @property
    def examples(self) -> list[Cell]:
        """The code cells that are neither exported nor part of the opening picture."""
        opening = {cell.number for cell in self.opening}
        return [cell for cell in self.code if not cell.is_exported and cell.number not in opening]

    @property
    def defines(self) -> set[str]:
        """All names that its exported cells define."""
        return set().union(*(cell.defines for cell in self.exported))


def read_notebook(path: Path) -> Notebook:
    """The notebook at `path`."""
    cells, module = [], None
    for number, raw in enumerate(json.loads(path.read_text())["cells"]):
        cell = Cell(number, raw["cell_type"], "".join(raw["source"]), module is not None)
        if "default_exp" in cell.directives:
            module = f"{PACKAGE}.{cell.directives['default_exp'].strip()}"
            cell.after_default_exp = True
        cells.append(cell)
    return Notebook(path, cells, module)


def all_notebooks() -> list[Notebook]:
    """Every notebook, in the order in which a file browser lists them."""
    paths = sorted(files_below(NOTEBOOKS, ".ipynb"), key=lambda path: path.relative_to(NOTEBOOKS).parts)
    return [read_notebook(path) for path in paths]


def in_reading_order() -> list[Notebook]:
    """The notebooks in reading order, without the index and the tutorials, which use the finished package."""

    def uses_the_finished_package(book: Notebook) -> bool:
        return book.name == "index.ipynb" or book.name.startswith("tutorials")

    return [book for book in all_notebooks() if not uses_the_finished_package(book)]


class Reader:
    """Follows the cells of one notebook and says which modules of the package each of them needs."""

    def __init__(self, modules: Modules):
        self.modules = modules
        self.aliases: dict[str, str] = {}
        """Name in the notebook -> the module or package that it stands for."""
        self.imported: dict[str, list[str]] = {}
        """Name in the notebook -> the modules that define it."""

    def read(self, cell: Cell) -> list[Read]:
        """What this cell needs, imports inside functions and names reached through a module included."""
        found = []
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += self._import(node)
            elif isinstance(node, ast.Call):
                found += self._dynamic_import(node)
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Attribute):
                found += self._attribute(node)
        for name in cell.defines:
            self.aliases.pop(name, None)
            self.imported.pop(name, None)
        return found

    def _import(self, node: ast.Import | ast.ImportFrom) -> Iterator[Read]:
        """The modules behind one import statement; remembers what its names stand for."""
        said = ast.unparse(node)
        for alias in node.names:
            if isinstance(node, ast.Import):
                if alias.name.split(".")[0] != PACKAGE:
                    continue
                self.aliases[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
                if alias.name != PACKAGE:
                    yield Read(alias.name, node.lineno, said)
            elif (node.module or "").split(".")[0] == PACKAGE:
                yield from self._from(node.module, alias, node.lineno)

    def _from(self, owner: str, alias: ast.alias, line: int) -> Iterator[Read]:
        """The modules behind `from owner import alias`."""
        name, said = alias.asname or alias.name, f"from {owner} import {alias.name}"
        if f"{owner}.{alias.name}" in self.modules:
            self.aliases[name] = f"{owner}.{alias.name}"
        sources = [owner] if alias.name == "*" else self.modules.defining(owner, alias.name) or [owner]
        self.imported[name] = sources
        yield from (Read(module, line, said) for module in sources if module != PACKAGE)

    def _dynamic_import(self, node: ast.Call) -> Iterator[Read]:
        """The module behind `import_module("oprd_nb...")`."""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if called in ("import_module", "__import__") and str(first).startswith(f"{PACKAGE}."):
            yield Read(first, node.lineno, ast.unparse(node))

    def _attribute(self, node: ast.Attribute) -> list[Read]:
        """The module behind `alias.name`, where `alias` stands for a module or a package."""
        if not isinstance(node.value, ast.Name | ast.Attribute):
            return []
        owner = self._module_of(node.value)
        if owner is None or f"{owner}.{node.attr}" in self.modules:
            return []
        sources = self.modules.defining(owner, node.attr)
        return [Read(module, node.lineno, ast.unparse(node)) for module in sources if module != PACKAGE]

    def _module_of(self, node: ast.expr) -> str | None:
        """The module that an expression such as `oprd_nb.plots` stands for."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._module_of(node.value)
        return f"{owner}.{node.attr}" if owner and f"{owner}.{node.attr}" in self.modules else None


def modules_read(book: Notebook, modules: Modules) -> dict[int, list[Read]]:
    """For each code cell of a notebook, by number, the modules of the package that it needs."""
    reader = Reader(modules)
    return {cell.number: reader.read(cell) for cell in book.code}


def own_module_uses(book: Notebook, modules: Modules) -> list[Read]:
    """Uses of the finished module in example cells, where the notebook's own cells define the name."""
    reader, found = Reader(modules), []
    examples = {cell.number for cell in book.examples}
    for cell in book.code:
        names = set(reader.imported) - set(reader.aliases)
        from_elsewhere = {name for name in names if book.module in reader.imported[name]}
        reads = reader.read(cell)
        if cell.number not in examples:
            continue
        own = [read for read in reads if read.module == book.module]
        found += [Read(f"cell {cell.number}", read.line, read.said) for read in own]
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in from_elsewhere:
                said = f"{node.id}, imported from {book.module}"
                found.append(Read(f"cell {cell.number}", node.lineno, said))
    return found
