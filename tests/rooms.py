"""The package's rooms, its modules, and who imports what."""

import ast
from collections import defaultdict
from pathlib import Path

import sdecontrol

ROOT = Path(sdecontrol.__file__).parent
#: a room imports from those before it (and from the files beside them: errors, randomness, tensors)
FLOORS = (
    {"processes"},
    {"chains"},
    {"paths"},
    {"problems"},
    {"controls"},
    {"files"},
    {"particles"},
    {"evaluation"},
    {"exact"},
    {"methods"},
    {"training"},
    {"models", "library", "comparison"},
    {"cli"},
)
Imports = dict[str, dict[str, set[str]]]


def modules() -> dict[str, ast.Module]:
    out = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts)] = ast.parse(path.read_text())
    return out


MODULES = modules()


def imports() -> Imports:
    """``module -> module it imports -> names``, of every import that stands in the package, inside functions too."""
    found: Imports = defaultdict(lambda: defaultdict(set))
    for name, tree in MODULES.items():
        package = name.split(".")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    whole = ".".join([*base, alias.name])
                    target = whole if whole in MODULES else ".".join(base)
                    if target not in MODULES:
                        target = f"{target}.__init__"
                    found[name][target].add(alias.name)
    return found


IMPORTS = imports()
