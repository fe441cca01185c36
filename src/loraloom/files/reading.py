"""Files that anybody may have written: JSON and YAML, faults told in a line; and links that lead out of a folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from loraloom.errors import LoraloomError, first_line

_LARGEST = 64 << 20  # bytes, most of them in strings
_MOST = 1_000_000  # values; each takes some hundred bytes of memory, and the largest indices have 150,000
_LARGEST_YAML = 256 << 10  # bytes; what people write by hand, and a second of parsing
_DEEPEST, _UNFOLDED = 20, 100_000  # levels of YAML, and values where every alias is written out
_LARGEST_NUMBER = 2**63
_POINTER = b"version https://git-lfs.github.com/spec/"


def parse_json(text: str, *, most: int = _MOST, widest: int = _MOST) -> Any:
    """Return what a JSON text holds: plain dicts, lists, strings, finite numbers.

    Raises ValueError that says why where it is none: nested too deeply, a key given twice, numbers of thousands of
    digits, NaN or Infinity, half a surrogate pair, more than `most` values or, in one object, `widest` keys.
    """
    if sum(map(text.count, ",[{")) > most:
        raise ValueError(f"more than {most:,} values")
    try:
        hook = partial(json_object, widest=widest)
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=hook)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a pair passes the parser
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return content


def json_object(pairs: list[tuple[str, Any]], widest: int = _MOST) -> dict[str, Any]:
    """Return the object of these keys and values; JSON itself would keep the last of a key's values in silence."""
    if len(pairs) > widest:
        raise ValueError(f"an object of {len(pairs):,} keys")
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is given twice")
    return content


def read_json(path: Path, hint: str = "save it again", *, most: int = _MOST, widest: int = _MOST) -> Any:
    """Return what the JSON file at `path` holds; see `parse_json`.

    Raises LoraloomError with `hint` where it cannot be read: no JSON, no UTF-8, more than 64 MB.
    """
    try:
        return parse_json(_text(path, _LARGEST, hint), most=most, widest=widest)
    except ValueError as error:  # UnicodeError and JSONDecodeError among them
        raise LoraloomError(f"{path}: not valid JSON ({first_line(error)[:200]}): half-written?", hint) from error
    except OSError as error:
        raise LoraloomError(f"{path}: cannot be read ({error.strerror or error})", hint) from error


def check_fetched(path: Path) -> None:
    """Raise LoraloomError where Git left a pointer in place of the file at `path`, which LFS keeps; or OSError."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            hint = "fetch it: `git lfs pull` in its repository, or `hf download`"
            raise LoraloomError(f"{path}: a pointer of Git LFS, not the file itself", hint)


def is_own(path: Path) -> bool:
    """Tell whether `path` is a regular file that lies in its folder, or in the blobs beside a snapshot of the hub's."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    stores = (one.parent for one in folder.parents if one.name == "snapshots")
    cached = any(target.parent == store / "blobs" for store in stores)
    return target.is_file() and (cached or target.is_relative_to(folder))


def read_json_object(path: Path, hint: str = "save it again") -> dict[str, Any]:
    """Return the JSON object at `path`; see `read_json`. Raises LoraloomError where it holds anything else."""
    content = read_json(path, hint)
    if not isinstance(content, dict):
        raise LoraloomError(f"{path}: holds no JSON object", hint)
    return content


def read_yaml(path: Path, hint: str = "mend the line that it names") -> Any:
    """Return what the YAML file at `path` holds: plain dicts, lists, strings, numbers; a date stays as written.

    Raises LoraloomError with `hint` where it cannot be read: no YAML or no UTF-8, a key given twice, another tag than
    those of JSON's types, nested too deeply, aliases that unfold without end, numbers of more than 64 bits, half a
    surrogate pair, more than 256 kB.
    """
    try:
        content = yaml.load(_text(path, _LARGEST_YAML, hint), Loader=_PlainYaml)
        _check_unfolded(content)
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise LoraloomError(f"{path}: not valid YAML: {error.problem or error.context}{where}", hint) from error
    except (yaml.YAMLError, ValueError) as error:  # UnicodeError among them
        raise LoraloomError(f"{path}: not valid YAML: {first_line(error)[:200]}", hint) from error
    except OSError as error:
        raise LoraloomError(f"{path}: cannot be read: {error.strerror or error}", hint) from error
    return content


class _PlainYaml(yaml.SafeLoader):
    """YAML of JSON's types alone, a key no more than once, which does not nest without end."""

    # 2001-99-99 would be refused as a date, and 2001-01-01 would be no text
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("map", "seq", "str", "int", "float", "bool", "null")
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node. Raises yaml.YAMLError naming the line that nests too deeply."""
        self.depth += 1
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. Raises yaml.YAMLError naming the line of what is not of its tag."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # of !!int foo, !!float "" ...
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"no {kind}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping in `node`. Raises yaml.YAMLError naming the line of a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write out what `<<` takes from other mappings. Raises yaml.YAMLError where that has no end."""
        super().flatten_mapping(node)
        if len(node.value) > _UNFOLDED:
            raise yaml.constructor.ConstructorError(None, None, "its aliases unfold without end", node.start_mark)


def _check_unfolded(content: Any) -> None:
    """Raise ValueError where the content, each alias written out, is too large, or a value is none of plain data."""
    waiting = [(content, 0)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _UNFOLDED:
            raise ValueError("its aliases unfold without end")
        if isinstance(value, str):
            value.encode()  # half a surrogate pair passes the parser
        elif isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
            raise ValueError("a number of more than 64 bits")
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]


def _text(path: Path, largest: int, hint: str) -> str:
    """Return the text of a regular file of at most so many bytes. Raises LoraloomError, OSError and UnicodeError."""
    if path.exists() and not path.is_file():
        raise LoraloomError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}", hint)
    if path.stat().st_size > largest:
        size = f"{largest >> 20} MB" if largest >> 20 else f"{largest >> 10} kB"
        raise LoraloomError(f"{path}: larger than {size}, which no such file is", hint)
    check_fetched(path)
    return path.read_bytes().decode("utf-8-sig")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
