"""Files that anybody may have written: JSON, with what is wrong in one line; and links that lead out of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from loraloom.errors import LoraloomError

_LARGEST = 64 << 20  # bytes, most of them in strings
_MOST = 1_000_000  # values; each takes some hundred bytes of memory, and the largest indices have 150,000


def read_json(path: Path, hint: str = "save it again") -> Any:
    """Return what the JSON file at `path` holds: plain dicts, lists, strings, finite numbers.

    Raises LoraloomError with `hint` where it cannot be read: no JSON or no UTF-8, nested too deeply, numbers of
    thousands of digits, NaN or Infinity, half a surrogate pair, more than 64 MB or a million values.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise LoraloomError(f"{path}: larger than {_LARGEST >> 20} MB, which no such file is", hint)
        text = path.read_bytes().decode("utf-8-sig")
        if sum(map(text.count, ",[{")) > _MOST:
            raise LoraloomError(f"{path}: holds more than {_MOST:,} values, which no such file does", hint)
        content = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a pair passes the parser
    except RecursionError as error:
        raise LoraloomError(f"{path}: not valid JSON (nested too deeply)", hint) from error
    except ValueError as error:  # UnicodeError and JSONDecodeError among them
        raise LoraloomError(f"{path}: not valid JSON ({_first_line(error)}): half-written?", hint) from error
    except OSError as error:
        raise LoraloomError(f"{path}: cannot be read ({error.strerror or error})", hint) from error
    return content


def is_own(path: Path) -> bool:
    """Tell whether `path` is a regular file that lies in its folder, or in the blobs beside a snapshot of the hub's."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return target.is_file() and (cached or target.is_relative_to(folder))


def read_json_object(path: Path, hint: str = "save it again") -> dict[str, Any]:
    """Return the JSON object at `path`; see `read_json`. Raises LoraloomError where it holds anything else."""
    content = read_json(path, hint)
    if not isinstance(content, dict):
        raise LoraloomError(f"{path}: holds no JSON object", hint)
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _first_line(error: ValueError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
