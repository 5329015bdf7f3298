"""A YAML file as lines, some of which are changed: all others, comments included, stay as they are, to the byte.

A library that loads a document and writes it again (ruamel.yaml) drops the comments below a key that is taken out, and indents
lists anew. Here the parser that Axolotl itself uses says where each key stands, and lines are taken out and put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """Where a key and its value stand."""

    key: str
    first: int  # line of the key
    last: int  # last line of its value
    column: int  # of the key
    key_end: int  # column behind the key, in its line
    node: yaml.Node  # the value; where that is an alias, the node it stands for


class YamlLines:
    """A YAML file, and the changes made to it.

    Raises:
        ValueError: if it is not one document of keys, one a line.
    """

    def __init__(self, text: str) -> None:
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.lines = text.splitlines(keepends=True)
        root, self.values = _parsed(text)
        self.entries = self._entries(root, len(self.lines))
        self._inside = {n for entry in self.entries.values() for n in range(entry.first, entry.last + 1)}
        self._changed: dict[int, list[str]] = {}  # what stands in the place of a line
        self._above: dict[int, list[str]] = {}  # what is put above a line

    def inside(self, key: str) -> dict[str, Entry]:
        """Return the keys of the block that a key holds.

        Raises:
            ValueError: if it is no block with one key a line.
        """
        entry = self.entries[key]
        node = entry.node
        if not isinstance(node, yaml.MappingNode) or node.flow_style or node.value[0][0].start_mark.line <= entry.first:
            raise ValueError(f"{key}: its keys are not written one a line below it. What works: a block of `key: value` lines.")
        return self._entries(node, entry.last + 1)

    def source(self, entry: Entry) -> list[str]:
        """Return the lines of an entry."""
        return self.lines[entry.first : entry.last + 1]

    def remove(self, entry: Entry) -> None:
        """Take out a key and its value. Comment lines stay: those above, and those inside below the key, itself a comment now."""
        inside = [line for line in self.source(entry)[1:] if line.lstrip().startswith("#")]
        self.replace(entry, [f"# {self.lines[entry.first].lstrip()}", *inside] if inside else [])

    def replace(self, entry: Entry, lines: list[str]) -> None:
        """Put lines in the place of a key and its value."""
        for number in range(entry.first, entry.last + 1):
            self._changed[number] = []
        self._changed[entry.first] = [self._ended(line) for line in lines]

    def comment_out(self, entry: Entry, why: str) -> None:
        """Turn a key and its value into a comment, below a line that says why."""
        self.replace(entry, [f"# {why}", *(f"# {line}" for line in self.source(entry))])

    def take(self, entry: Entry, key: str, indent: int, comments: bool = True, value: str | None = None) -> list[str]:
        """Take out a key with its value, and the comment lines right above it; return them under another key, moved right.

        A `value` takes the place of one that is written on a single line.
        """
        above = entry.first
        while comments and above and self.lines[above - 1].lstrip().startswith("#") and above - 1 not in self._inside:
            above -= 1
        first, *rest = self.source(entry)
        if value is not None and entry.node.start_mark.line == entry.node.end_mark.line == entry.first:
            first = first[: entry.node.start_mark.column] + value + first[entry.node.end_mark.column :]
        lines = [*self.lines[above : entry.first], first[: entry.column] + key + first[entry.key_end :], *rest]
        for number in range(above, entry.last + 1):
            self._changed[number] = []
        return [" " * indent + self._ended(line) if line.strip() else line for line in lines]

    def set_value(self, entry: Entry, value: str, key: str | None = None) -> None:
        """Write another value, of one line, and if given another key; a comment behind the value stays."""
        line, start, end = self.lines[entry.first], entry.node.start_mark, entry.node.end_mark
        between, behind, below = ": ", "", list[str]()
        if entry.first == start.line == end.line and end.column > start.column:
            between, behind = line[entry.key_end : start.column], line[end.column :]
            below = self.source(entry)[1:]  # comments
        self.replace(entry, [line[: entry.column] + (key or entry.key) + between + value + behind, *below])

    def set_key(self, entry: Entry, key: str) -> None:
        """Write another key; the value stays."""
        first, *rest = self.source(entry)
        self.replace(entry, [first[: entry.column] + key + first[entry.key_end :], *rest])

    def append(self, entry: Entry, item: str) -> None:
        """Add an item to a list.

        Raises:
            ValueError: if the list stands elsewhere, under an anchor.
        """
        node, lines = entry.node, self.source(entry)
        if not entry.first <= node.start_mark.line <= entry.last:
            raise ValueError(f"{entry.key}: is an alias of a list elsewhere. What works: the list written out.")
        empty = isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null")
        if empty or (isinstance(node, yaml.SequenceNode) and not node.value):
            behind = lines[0].partition("#")[2].strip()
            comment = f"  # {behind}" if behind else ""
            self.replace(entry, [f"{' ' * entry.column}{entry.key}:{comment}", f"{' ' * entry.column}  - {item}"])
        elif not isinstance(node, yaml.SequenceNode):
            raise ValueError(f"{entry.key}: {node.value!r} is no list. What works: `{entry.key}: [{node.value}]`.")
        elif node.flow_style:  # right behind the last item: a comma or a comment may follow it
            end = node.value[-1].end_mark
            line = lines[end.line - entry.first]
            lines[end.line - entry.first] = f"{line[: end.column]}, {item}{line[end.column :]}"
            self.replace(entry, lines)
        else:
            first = next(line for line in lines[1:] if line.lstrip().startswith("-"))
            self.replace(entry, [*lines, f"{first[: first.index('-')]}- {item}"])

    def put_above(self, entry: Entry, lines: list[str]) -> None:
        """Put lines above a key."""
        self._above.setdefault(entry.first, []).extend(self._ended(line) for line in lines)

    def put_below(self, entry: Entry, lines: list[str]) -> None:
        """Put lines below an entry, once it has been changed."""
        kept = self._changed.get(entry.last, [self.lines[entry.last]])
        self._changed[entry.last] = [self._ended(line) for line in (*kept, *lines)]

    def text(self) -> str:
        """Return the changed file; of the empty lines around what was taken out, those above stay."""
        result: list[str] = []
        gap = False  # something was taken out since the last line that was kept
        for number, line in enumerate(self.lines):
            new = self._above.get(number, []) + self._changed.get(number, [line])
            if gap and new and not new[0].strip() and (not result or not result[-1].strip()):
                new = new[1:]
            gap = not new or (gap and not any(item.strip() for item in new))
            if new and result:
                result[-1] = self._ended(result[-1])
            result += new
        return "".join(result)

    def _ended(self, line: str) -> str:
        return line if line.endswith("\r\n") else line.rstrip("\r\n") + self.newline

    def _entries(self, node: yaml.MappingNode, end: int) -> dict[str, Entry]:
        starts = [key.start_mark.line for key, _ in node.value] + [end]
        found: dict[str, Entry] = {}
        for i, (key, value) in enumerate(node.value):
            name, first, column = str(key.value), key.start_mark.line, key.start_mark.column
            if name in found:
                raise ValueError(
                    f"{name}: is there twice, in lines {found[name].first + 1} and {first + 1}. What works: one of them."
                )
            last = starts[i + 1] - 1
            while last > first and _is_outside(self.lines[last], column):
                last -= 1
            found[name] = Entry(name, first, last, column, key.end_mark.column, value)
        return found


def _is_outside(line: str, column: int) -> bool:
    """Return whether a line below a value is none of it: empty, a comment no deeper than its key, or the document's end."""
    content = line.strip()
    return not content or content in ("...", "---") or (content[0] == "#" and len(line) - len(line.lstrip()) <= column)


def _parsed(text: str) -> tuple[yaml.MappingNode, dict[str, Any]]:
    """Return a text's root and its values.

    Raises:
        ValueError: naming the line, if it is not one document of keys.
    """
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        if len(documents) > 1:
            line = documents[1].start_mark.line + 1
            raise ValueError(
                f"it holds {len(documents)} documents, the second from line {line} on. What works: one, without `---` in it."
            )
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        tab = "\\t" in str(error.problem)
        works = "spaces, where the line is indented with tabs" if tab else "YAML as `axolotl train` reads it"
        raise ValueError(f"{where}{error.problem or error.context}. What works: {works}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())}). What works: an Axolotl configuration.") from error
    root = documents[0] if documents else None
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, dict):
        raise ValueError(
            f"it holds {'nothing' if values is None else f'a {type(values).__name__}'}. What works: an Axolotl configuration."
        )
    if root.flow_style:
        raise ValueError("its keys stand in braces. What works: one `key: value` a line.")
    return root, values
