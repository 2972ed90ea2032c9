"""Pages of list RPCs, and the tokens that name the next one."""

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from deltamux.errors import InvalidArgumentError
from deltamux.server.rpc.names import is_id

DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_PAGE_BYTES = 4 << 20
"""Of all entries of one page: a response has little else."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")
_NUMBER = re.compile("[1-9][0-9]{0,17}")


def split_page(found: Sequence[T], size: int, id_of: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """Returns the first `size` of the records found, and the next page's token: "" if there are no more."""
    return found[:size], page_token(id_of(found[size - 1])) if len(found) > size else ""


def page_size(requested: int) -> int:
    """Returns how many records a page holds: the requested size, within bounds; the default for 0."""
    if requested < 0:
        raise InvalidArgumentError(f"page_size {requested} is negative", metadata={"field": "page_size"})
    return min(requested or DEFAULT_PAGE, MAX_PAGE)


def page_token(last: str) -> str:
    """Returns the token of the page that begins after `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def after_id(token: str) -> str:
    """Returns the id after which the page of a token begins; "" for the first page.

    Raises:
        InvalidArgumentError: the token was not made by `page_token` from an id.
    """
    after = _decoded(token)
    if token and (after is None or not is_id(after)):
        raise _invalid_token(token)
    return after or ""


def after_number(token: str) -> int:
    """Returns the version number after which the page of a token begins; 0 for the first page. Raises likewise."""
    after = _decoded(token)
    if token and (after is None or not _NUMBER.fullmatch(after)):
        raise _invalid_token(token)
    return int(after or 0)


def within_page(messages: Iterable[M]) -> list[M]:
    """Returns the messages that fit into one response: as many from the first as `MAX_PAGE_BYTES` hold, at least one.

    Versions that were stored before labels had bounds may be larger than a page's share.
    """
    page: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if page and size > MAX_PAGE_BYTES:
            break
        page.append(message)
    return page


def _decoded(token: str) -> str | None:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError:
        return None


def _invalid_token(token: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{token[:80]!r} is not a page token: send next_page_token of the last response, or none",
        reason="INVALID_PAGE_TOKEN",
        metadata={"field": "page_token"},
    )
