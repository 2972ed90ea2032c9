"""Parts of a composition on the command line."""

from deltamux.errors import InvalidArgumentError


def weighted(part: str) -> tuple[str, float]:
    """Returns a part and its weight, which comes after ``=`` and is 1 where there is none."""
    name, equals, weight = part.rpartition("=")
    try:
        return (name, float(weight)) if equals else (part, 1.0)
    except ValueError:
        raise InvalidArgumentError(f"{part!r}: a weight is a number", metadata={"field": "parts"}) from None
