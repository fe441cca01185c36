"""JSON out of files that anybody may have written: one reader, which tells what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from loraloom.errors import LoraloomError

_LARGEST = 64 << 20  # bytes; parsed, JSON takes some eight times as much memory


def read_json(path: Path, hint: str = "save it again") -> Any:
    """Return what the JSON file at `path` holds: plain dicts, lists, strings, finite numbers.

    Raises LoraloomError with `hint` where it cannot be read: no JSON or no UTF-8, nested too deeply, numbers of
    thousands of digits, NaN or Infinity, half a surrogate pair, more than 64 MB.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise LoraloomError(f"{path}: larger than {_LARGEST >> 20} MB, which no such file is", hint)
        text = path.read_bytes().decode("utf-8-sig")
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
