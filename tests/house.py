"""The laws of the house as functions from source text to findings; which files they judge is in test_house.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

# from the ground up; a module imports from its own floor and from those below
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors config grid catalogue device optional process progress region_order units versions",
        "cases datasets logfile notebook readers writers metrics overview views",
        "preprocess networks restore",
        "patches augment losses muon optimise state whole_batch body",
        "check consistency convert findings fingerprint plan model namesakes pretrained regions shipped sides "
        "statistics told",
        "engines leaks windows postprocess evaluate",
        "infer inspect quality report export",
        "asked folder record bench calibrate compare journal looks ranks",
        "fit train",
        "demo",
        "__init__",
        "cli terminal __main__ pipelines",
    )
)
FACE, TOP = 10, 11
FILE_LIBRARIES = {"pydicom", "nibabel", "SimpleITK", "PIL", "highdicom", "gdcm"}
MAX_LINES = 600


def room(module: str) -> str:
    """The room of a dotted module name: `readers` for `medseg.readers.nifti`, `__init__` for the face."""
    first, *rest = module.split(".")
    if first == "medseg_pipelines":
        return "pipelines"
    return rest[0] if rest else "__init__"


def floor(module: str) -> int:
    """The floor of a module. Raises `LookupError` for a room that has none yet: give it one in `FLOORS`."""
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise LookupError(f"{module}: room `{room(module)}` is on no floor; add it to FLOORS in tests/house.py")


def imports(tree: ast.AST, known: frozenset[str] = frozenset(), *, typing: bool = True) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, deferred or not; `typing` False leaves out TYPE_CHECKING blocks.

    `from a import b` gives `a.b` where that is one of the `known` modules, else `a`. Relative imports begin with a dot.
    """
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in known else base


def upward(module: str, tree: ast.AST, known: frozenset[str]) -> list[str]:
    """Imports from a higher floor, and relative ones."""
    found = []
    for line, name in imports(tree, known, typing=module != "medseg"):
        if name.startswith("."):
            found.append(f"{module}:{line} imports {name}: write the whole name")
        elif name.split(".")[0] in ("medseg", "medseg_pipelines") and floor(name) > floor(module):
            found.append(f"{module}:{line} imports {name} from a higher floor")
    return found


def beside_the_face(module: str, tree: ast.AST) -> list[str]:
    """Imports of `cli` and the pipelines from inside medseg, but for what a terminal is shown and extras."""
    if floor(module) != TOP or module == "medseg.__main__":
        return []
    inside = [
        (n, name)
        for n, name in imports(tree)
        if name.startswith("medseg.") and room(name) not in ("cli", "optional", "terminal")
    ]
    return [f"{module}:{n} imports {name}: use the face" for n, name in inside]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every circle that a depth-first walk of the import graph meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for after in sorted(graph.get(node, set())):
                walk(after, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def file_libraries(module: str, tree: ast.AST) -> list[str]:
    """Imports of libraries of file formats outside readers and writers."""
    if room(module) in ("readers", "writers"):
        return []
    return [f"{module}:{n} imports {name}" for n, name in imports(tree) if name.split(".")[0] in FILE_LIBRARIES]


def prints_or_environment(module: str, tree: ast.AST) -> list[str]:
    """`print` and the environment, which only `cli` and the pipelines may touch."""
    if floor(module) == TOP:
        return []
    found = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if text in ("print", "os.environ", "os.getenv", "os.putenv", "environ", "getenv"):
            found.append(f"{module}:{getattr(node, 'lineno', 0)} uses {text}")
    return found


def foreign_code(module: str, tree: ast.AST) -> list[str]:
    """Whatever could run code out of data: eval, exec, pickle and its like, unsafe yaml, unguarded torch.load."""
    found = [
        f"{module}:{n} imports {name}"
        for n, name in imports(tree)
        if name.split(".")[0] in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        guards = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = (
            name in ("eval", "exec", "compile", "__import__")
            or (name.startswith("yaml.") and "load" in name and name not in ("yaml.safe_load", "yaml.safe_load_all"))
            or (name == "torch.load" and guards.get("weights_only") != "True")
            or (name.endswith(("np.load", "numpy.load")) and guards.get("allow_pickle") == "True")
        )
        if unsafe:
            found.append(f"{module}:{node.lineno} calls {name}")
    return found


def swallowed(module: str, tree: ast.AST) -> list[str]:
    """`except` blocks that do nothing at all, and bare ones."""
    return [
        f"{module}:{node.lineno} swallows an exception"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in node.body))
    ]


def asserts(module: str, tree: ast.AST) -> list[str]:
    """`assert` statements: `python -O` removes them."""
    return [f"{module}:{node.lineno} asserts" for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def undocumented(module: str, tree: ast.Module) -> list[str]:
    """The module, public classes, functions and methods without a docstring."""
    found = [] if ast.get_docstring(tree) else [f"{module} has no docstring"]

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node) and not _inherits_its_words(node):
                found.append(f"{module}:{node.lineno} {prefix}{node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.")

    look(tree.body, "")
    return found


def _inherits_its_words(node: ast.stmt) -> bool:
    # torch.nn.Module documents forward
    return isinstance(node, ast.FunctionDef) and node.name == "forward"


def too_long(module: str, source: str) -> list[str]:
    """Files of `MAX_LINES` lines or more."""
    lines = len(source.splitlines())
    return [f"{module} has {lines} lines, expected fewer than {MAX_LINES}"] if lines >= MAX_LINES else []
