"""Reward rules: a Python function instead of a trained model, for the reward service, annotators and judges.

    def shorter_is_better(items: Sequence[ScoreItem]) -> Sequence[float]:
        return [-len(item.completion) for item in items]

named as "package.module:function" or "path/to/file.py:function". The function is given 1 or more items, the whole of
one call, and answers one finite number each, in their order.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import RuleError, SettingsError


@dataclass(frozen=True)
class ScoreItem:
    """One completion to score."""

    prompt: str
    completion: str
    tokens: tuple[int, ...] = ()
    """The completion's tokens, the end token included; empty where only text was sent."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the prompt's data row, such as `answer`; empty where none was sent."""


RuleFunction = Callable[[Sequence[ScoreItem]], Sequence[float]]


@dataclass(frozen=True)
class Rule:
    name: str
    """As it was given, module:function."""
    sha256: str
    """Of the source file that holds the function."""
    function: RuleFunction

    def score(self, items: Sequence[ScoreItem]) -> NDArray[np.float32]:
        """Scores [N].

        Raises:
            RuleError: the function raised, or answered anything but N finite numbers.
        """
        try:
            answer = self.function(items)
        except (Exception, SystemExit) as error:
            what = str(error).splitlines()[0] if str(error) else "no message"
            raise RuleError(f"rule {self.name} raised {type(error).__name__}: {what}") from error
        return self._checked(answer, len(items))

    def _checked(self, answer: Any, wanted: int) -> NDArray[np.float32]:
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
                scores = np.asarray(answer, dtype=np.float64).astype(np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RuleError(f"rule {self.name} answered {type(answer).__name__}, no sequence of numbers") from error
        if scores.shape != (wanted,):
            raise RuleError(
                f"rule {self.name} answered an array of shape {list(scores.shape)} for {wanted} item(s); "
                "one number each is needed"
            )
        if not np.isfinite(scores).all():
            where = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RuleError(f"rule {self.name} answered {scores[where]} for item {where}; scores must be finite")
        return scores


def load_rule(name: str) -> Rule:
    """The rule called "module:function" or "path/to/file.py:function".

    Raises:
        SettingsError: there is no such module, file or function.
        RuleError: the module raised while it was imported.
    """
    place, _, function_name = name.rpartition(":")
    if not place or not function_name.isidentifier():
        raise SettingsError(f"rule: module:function or path/to/file.py:function expected, {name!r} received")
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SettingsError(f"rule: {place} has no function {function_name}")
    return Rule(name, _source_sha256(module), function)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise SettingsError(f"rule: no module {name} can be imported; install it, or name its file") from error
        raise RuleError(f"rule: module {name} needs {error.name}, which is not installed") from error
    except Exception as error:
        raise RuleError(f"rule: module {name} raised {type(error).__name__} when imported: {error}") from error


def _load_file(path: Path) -> ModuleType:
    # The digest keeps two files of one name apart, and sys.modules is where dataclasses and others look a module up.
    module_name = f"rlhf_rule_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SettingsError(f"rule: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise RuleError(f"rule: {path} raised {type(error).__name__} when imported: {error}") from error
    return module


def _source_sha256(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if file is None:
        raise SettingsError(f"rule: module {module.__name__} has no source file whose hash could name the rule")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
