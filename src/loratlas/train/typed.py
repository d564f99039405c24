"""Whether a value read from a file fits the annotation of a dataclass field, and what would."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

_NOUNS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    type(None): ("null", "null"),
}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is one of `hint`: an integer is also a number, a list stands for tuples and sets as well.

    Annotations that no YAML value can have, such as classes of other libraries, let everything pass.
    """
    if hint is bool or hint is str or hint is type(None):
        return isinstance(value, hint)
    if hint is int or hint is float:
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, set, tuple):
        each = inner[0] if inner else Any
        return isinstance(value, list | tuple | set) and all(fits(item, each) for item in value)
    if origin is dict:
        key, item = inner or (Any, Any)
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    return True


def in_words(hint: Any, *, several: bool = False) -> str:
    """What fits `hint`, for an error: "an integer or null", "a list of texts"."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(each) for each in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (list, set, tuple):
        return f"a list of {in_words(inner[0], several=True)}" if inner else "a list"
    if origin is dict:
        return f"names with {in_words(inner[1], several=True)}" if inner else "names with values"
    return _NOUNS[hint][several] if hint in _NOUNS else getattr(hint, "__name__", str(hint))
