"""The documents in a JSON value: texts of objects, and chats. Where a long text is cut.

documents_in({"messages": [{"from": "Anna", "text": "hi"}, {"from": "Bob", "text": "hello"}]}, "text")
"""

import re
from collections.abc import Iterator
from typing import Any

TXT_BYTES = 8192  # a document of a .txt file ends at the first blank line after this many bytes
TEXT_KEYS = ("text", "content", "body", "value")  # of a message in a chat export
AUTHOR_KEYS = ("from", "sender", "sender_name", "role", "user")


def documents_in(value: Any, column: str) -> list[str]:
    """The documents in a JSON value: texts of objects, and chats, whose messages become lines "name: text".

    A chat is a list of objects of which one has an author. A long one is cut into several documents. An object
    without a text may contain one list or object with texts. Without any text: [].
    """
    if isinstance(value, dict):
        if text := text_of(value, column):
            return [text]
        if isinstance(tree := value.get("mapping"), dict):  # ChatGPT's: the messages are nodes of a tree
            return documents_in([node.get("message") for node in tree.values() if isinstance(node, dict)], column)
        found = list(filter(None, (documents_in(part, column) for part in value.values())))
        return found[0] if len(found) == 1 else []  # of several lists none is chosen
    objects = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    messages = [(author_of(item), text) for item in objects if (text := text_of(item, column))]
    if any(author for author, _ in messages):
        chat = "\n".join(f"{author}: {text}" if author else text for author, text in messages)
        return list(cut_text(chat, TXT_BYTES))
    return [text for item in objects for text in documents_in(item, column)]


def text_of(item: dict, column: str) -> str | None:
    """The text of an object that is not empty: a string or a list of parts."""
    for key in TEXT_KEYS if column == "text" else (column,):
        value = value_at(item, key)
        parts = value.get("parts") if isinstance(value, dict) else value
        parts = parts if isinstance(parts, list) else [parts]
        parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if text := "".join(part for part in parts if isinstance(part, str)):
            return text
    return None


def author_of(item: dict) -> str | None:
    """Who wrote a message. An author that is text is no sign of a chat: articles have that too."""
    author = item.get("author")
    if isinstance(author, dict):
        return author.get("name") or author.get("role")
    return next((item[key] for key in AUTHOR_KEYS if isinstance(item.get(key), str)), None)


def value_at(item: dict, name: str) -> Any:
    """The value of a key, or of a key in an object in it: meta.text."""
    if name in item or "." not in name:
        return item.get(name)
    first, _, rest = name.partition(".")
    below = item.get(first)
    return value_at(below, rest) if isinstance(below, dict) else None


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cuts a text into parts of `size` to 2 * `size` characters, at a blank line, a line end, a space or anywhere."""
    start = 0
    while len(text) - start > 2 * size:
        for mark in (r"\n\s*\n", r"\n", r"\s", ""):
            if found := re.compile(mark).search(text, start + size, start + 2 * size):
                break
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]
