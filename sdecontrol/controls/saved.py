"""What files say of controls and values, and how these are made again: a class registers the kind that its files name.

A class of a kind has ``configuration``, what a file says of an object, and is registered with a function
``(saved, context) -> object``, which makes the object again with fresh parameters: files hold those as tensors. Without
one its classmethod ``from_saved`` is that function.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ..chains.base import Chain
from ..errors import BadFileError
from ..problems.problem import ControlProblem

T = TypeVar("T")


class Saved(dict[str, Any]):
    """What a file says of one object. A field that it lacks is a :class:`BadFileError` that names it."""

    def __init__(self, facts: Any, where: Any) -> None:
        if not isinstance(facts, dict):
            raise BadFileError(f"{where} must say what it is, got {facts!r}.")
        super().__init__(facts)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise BadFileError(f"{self.where} has no field {name!r}: it was not written by this version of the package.")

    def settings(self, cls: type[T]) -> T:
        """A dataclass from the fields of its names; JSON's lists are its tuples."""
        values = {field.name: self[field.name] for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class Context:
    """With what an object of a file is made again.

    Attributes:
        problem, chain: that it belongs to.
        control, value: the user's own, as given to ``load``.
        path: of the file, for messages.
    """

    problem: ControlProblem
    chain: Chain
    control: Any = None
    value: Any = None
    path: Any = "the file"

    def own_control(self) -> Any:
        """The user's own control.

        Raises:
            TypeError: it is not given.
        """
        if self.control is None:
            raise TypeError("this solution's control is your own module: give it again as load(..., control=module).")
        return self.control

    def own_value(self, what: str) -> Callable[..., Any]:
        """The user's own value function or classifier.

        Raises:
            TypeError: it is not given.
        """
        if not callable(self.value):
            raise TypeError(f"this solution has a {what} of your own: give it again as load(..., value=function).")
        return self.value


class Kinds:
    """The classes of one sort of saved objects, by the kind that files name.

    Args:
        what: the sort, in words.
        otherwise: the kind of objects whose class is not registered; None: they cannot be saved.
    """

    def __init__(self, what: str, otherwise: str | None = None) -> None:
        self.what, self.otherwise = what, otherwise
        self.classes: dict[str, Any] = {}
        self.makers: dict[Any, Callable[[Saved, Context], Any]] = {}

    def register(self, kind: str, make: Callable[[Saved, Context], Any] | None = None) -> Callable[[type[T]], type[T]]:
        """A decorator of classes: ``kind`` is what files call theirs. Subclasses are not of the kind: they register
        their own.

        Args:
            make: ``(saved, context) -> object``; default: the class's ``from_saved``.

        Raises:
            ValueError: another class has the kind. TypeError: the class cannot be made again.
        """

        def add(cls: type[T]) -> type[T]:
            maker = make or getattr(cls, "from_saved", None)
            if maker is None:
                raise TypeError(f"{cls.__name__} needs a classmethod from_saved(saved, context) to be registered.")
            known = self.classes.get(kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a notebook runs again
                raise ValueError(f"the kind {kind!r} of {self.what} is that of {known.__qualname__}; use another name.")
            self.classes[kind], self.makers[cls] = cls, maker
            return cls

        return add

    def find(self, kind: Any, where: Any) -> Any:
        """The class of a kind.

        Raises:
            BadFileError: there is none, naming those there are.
        """
        if kind not in self.classes:
            raise BadFileError(
                f"{where} has a {self.what} of the unknown kind {kind!r}; known: {', '.join(sorted(self.classes))}. "
                "A class of your own registers its kind before its files are loaded."
            )
        return self.classes[kind]

    def describe(self, made: Any) -> Any:
        """What a file says of an object: its kind and configuration; None of None.

        Raises:
            TypeError: its class is not registered, and there is no other way.
        """
        if made is None:
            return None
        kind = next((kind for kind, cls in self.classes.items() if cls is type(made)), self.otherwise)
        if kind is None:
            raise TypeError(f"a {type(made).__name__} cannot be saved: its class is no registered kind of {self.what}.")
        return {"kind": kind, **made.configuration}

    def make(self, saved: Any, context: Context) -> Any:
        """The object that :meth:`describe` described, with fresh parameters.

        Raises:
            BadFileError: an unknown kind, or a field that is missing. TypeError: what is the user's own is not given.
        """
        if saved is None:
            return None
        facts = Saved(saved, f"{context.path}: the {self.what}")
        return self.makers[self.find(facts["kind"], context.path)](facts, context)


CONTROLS = Kinds("control", otherwise="user")
VALUES = Kinds("value")
