"""Frozen pydantic dataclasses whose bad values are refused in one line: value, and what is allowed."""

from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def strict(cls: type) -> type:
    """Make a class such a dataclass."""
    cls = dataclass(frozen=True, config=CONFIG)(cls)
    validate, fields = cls.__init__, cls.__pydantic_fields__

    def __init__(self: object, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise ValueError(_line(error.errors()[0], fields)) from None

    cls.__init__ = __init__
    return cls


def field(default: Any, description: str, **limits: float) -> Any:
    """A value with its default, its description, and its limits as pydantic has them."""
    return Field(default, description=description, **limits)


def _line(problem: dict[str, Any], fields: dict[str, Any]) -> str:
    name = problem["loc"][0]
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name} is not a setting; allowed: {', '.join(fields)}."
    allowed = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}; allowed: {allowed}."
