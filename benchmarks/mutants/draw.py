"""Which mutants: drawn with a fixed seed, over all rooms and all kinds of change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .operators import KINDS, Change, changes, is_program

__all__ = ["Mutant", "draw", "files_of_room", "rooms", "shares"]

#: the files beside the rooms, together
SHARED = "shared"
_LEAST = 3  # mutants of a small room
#: files that say or draw something, or name things
_LEFT_OUT = {"__init__.py", "public.py", "shapes.py", "metrics.py", "training/progress.py"}


@dataclass(frozen=True)
class Mutant:
    """A change of a file of the package."""

    name: str
    room: str
    file: str
    change: Change

    def lines(self, source: bytes) -> tuple[str, str]:
        """The lines that it touches, before and after."""
        change = self.change
        first = source.rfind(b"\n", 0, change.start) + 1
        last = source.find(b"\n", change.end)
        end = len(source) if last < 0 else last
        before = source[first:end].decode()
        after = source[first : change.start].decode() + change.text + source[change.end : end].decode()
        return _on_one_line(before), _on_one_line(after)


def _on_one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines())


def _is_left_out(file: Path, package: Path) -> bool:
    inside = file.relative_to(package).as_posix()
    return inside in _LEFT_OUT or file.name == "__init__.py" or "figure" in file.name


def rooms(package: Path) -> list[str]:
    """The rooms of the package, and :data:`SHARED`."""
    return [*sorted(p.name for p in package.iterdir() if (p / "__init__.py").exists()), SHARED]


def files_of_room(package: Path, room: str) -> list[Path]:
    """Files of a room that are mutated."""
    folder = package if room == SHARED else package / room
    return [f for f in sorted(folder.glob("*.py")) if not _is_left_out(f, package)]


def shares(package: Path, number: int) -> dict[str, int]:
    """How many mutants of each room: as its lines, at least three, ``number`` in all."""
    lines = {r: sum(f.read_bytes().count(b"\n") for f in files_of_room(package, r)) for r in rooms(package)}
    share = {r: max(_LEAST, number * n // sum(lines.values())) for r, n in lines.items()}
    largest = sorted(lines, key=lambda r: -lines[r])
    while sum(share.values()) != number:
        step = 1 if sum(share.values()) < number else -1
        for room in largest[: abs(number - sum(share.values()))]:
            share[room] += step
    return share


def draw(package: Path, number: int, seed: int) -> list[Mutant]:
    """Mutants of a package, the same for the same package, number and seed.

    Within a room a kind is drawn first, each as often, then a change of that kind; no line is changed twice."""
    return [m for room, n in shares(package, number).items() for m in _of_room(package, room, n, seed)]


def _of_room(package: Path, room: str, number: int, seed: int) -> Iterator[Mutant]:
    generator = random.Random(f"{seed} {room}")
    sources = {f: f.read_bytes() for f in files_of_room(package, room)}
    by_kind: dict[str, list[tuple[Path, Change]]] = {kind: [] for kind in KINDS}
    for file, source in sources.items():
        for change in changes(source):
            by_kind[change.kind].append((file, change))
    taken: set[tuple[Path, int]] = set()
    while len(taken) < number:
        file, change = generator.choice(by_kind[generator.choice([k for k in KINDS if by_kind[k]])])
        if (file, change.line) in taken or not is_program(change, sources[file]):
            continue
        taken.add((file, change.line))
        name = f"{room}-{seed}-{len(taken):02d}"
        yield Mutant(name, room, file.relative_to(package.parent).as_posix(), change)
