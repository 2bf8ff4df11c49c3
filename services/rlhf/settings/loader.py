"""From defaults, files, environment and command line to one frozen `Settings`.

Later sources win: defaults < TOML files, in the order given < environment < `--set section.field=value` < flags.

- A file is TOML, or JSON if its name ends in `.json` (what a supervisor hands to its processes). Relative paths in it
  are relative to the current directory, as on the command line, not to the file.
- Every field has one variable, `RLHF_<SECTION>_<FIELD>`: `RLHF_REDIS_URL` is redis.url. An empty one counts as not
  set. Other variables that begin with RLHF_ are warned about, not refused, since an environment is shared.
- A value in the environment or on the command line is a TOML value (`50`, `true`, `["a", "b"]`); text needs no quotes,
  and `none` clears a field that may be left out.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf.errors import SettingsError
from rlhf.settings.run import Settings
from rlhf.settings.section import Section

PREFIX = "RLHF_"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """One value that somebody set, and where: `demo.toml`, `RLHF_PPO_STEPS`, `--set`, `--steps`."""

    section: str
    field: str
    value: Any
    source: str


def load_settings(
    *,
    files: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Settings:
    """
    Args:
        overrides: `section.field=value` each, as `--set` takes them.
        flags: from `section.field` to the value's text, as a verb's own options give them.

    Raises:
        SettingsError: names the field or the file and line, the rule, and the value received.
    """
    given = [one for path in files for one in _from_file(path)]
    given += _from_environment({} if environment is None else environment)
    given += [_from_override(text) for text in overrides]
    for name, text in (flags or {}).items():
        given.append(_from_text(name, text, source="--" + name.partition(".")[2].replace("_", "-")))
    return _validated(given)


def with_overrides(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings with others in the place of some.

    Args:
        overrides: `section.field=value` each, as `--set` takes them.

    Raises:
        SettingsError: as `load_settings`.
    """
    content: dict[str, dict[str, Any]] = settings.model_dump()
    given = [Given(section, field, value, "") for section, fields in content.items() for field, value in fields.items()]
    return _validated([*given, *(_from_override(text) for text in overrides)])


def sections() -> dict[str, type[Section]]:
    """Every section's name and class."""
    return {name: _section_class(info) for name, info in Settings.model_fields.items()}


def setting_names() -> list[str]:
    """Every `section.field`."""
    return [f"{name}.{field}" for name, section in sections().items() for field in section.model_fields]


def variable(name: str) -> str:
    """The environment variable of `section.field`."""
    return PREFIX + name.replace(".", "_").upper()


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean …?`, or nothing where no candidate is as near as `cutoff` (0: any is)."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def allows_none(annotation: Any) -> bool:
    return NoneType in _alternatives(annotation)


def parse_value(text: str, annotation: Any) -> Any:
    """The value that `text` means for a field of this type; see the module's docstring."""
    if text == "none" and allows_none(annotation):
        return None
    value = _toml_value(text)
    return text if _is_text(annotation) and not isinstance(value, str) else value


def _from_file(path: Path) -> list[Given]:
    content = _parsed(path)
    given = []
    for section, fields in content.items():
        if section not in Settings.model_fields:
            raise SettingsError(f"{path}: [{section}] is no section{nearest(section, Settings.model_fields)}")
        if not isinstance(fields, dict):
            raise SettingsError(f"{path}: {section} is a section with fields, written as [{section}]; got {fields!r}")
        for field, value in fields.items():
            _check_name(f"{section}.{field}", f"{path}: ")
            given.append(Given(section, field, value, str(path)))
    return given


def _parsed(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path}:{line}: not UTF-8 text") from error
    try:
        content: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except tomllib.TOMLDecodeError as error:
        line, message = _toml_place(str(error), text)
        raise SettingsError(f"{path}:{line}: not TOML: {message}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold an object of sections; got {_shown(content)}")
    return content


def _toml_place(message: str, text: str) -> tuple[int, str]:
    """Line and rest of tomllib's `Invalid value (at line 3, column 9)` or `… (at end of document)`."""
    found = re.search(r" \(at line (\d+), column \d+\)$", message)
    if found:
        return int(found[1]), message[: found.start()]
    return text.count("\n") + 1, message


def _from_environment(environment: Mapping[str, str]) -> list[Given]:
    names = {variable(name): name for name in setting_names()}
    for unknown in sorted(key for key in environment if key.startswith(PREFIX) and key not in names):
        logger.warning("%s is no setting and is ignored%s", unknown, nearest(unknown, names))
    return [_from_text(name, environment[key], source=key) for key, name in names.items() if environment.get(key)]


def _from_override(text: str) -> Given:
    name, separator, value = text.partition("=")
    if not separator:
        raise SettingsError(f"--set {text}: write --set section.field=value")
    return _from_text(name.strip(), value.strip(), source="--set")


def _from_text(name: str, text: str, source: str) -> Given:
    _check_name(name)
    section, field = name.split(".")
    return Given(section, field, parse_value(text, sections()[section].model_fields[field].annotation), source)


def _check_name(name: str, where: str = "") -> None:
    if name in setting_names():
        return
    section, dot, field = name.partition(".")
    here = [other for other in setting_names() if other.startswith(f"{section}.")]
    elsewhere = [other for other in setting_names() if other.endswith(f".{field if dot else section}")]
    hint = nearest(name, elsewhere, cutoff=0) or nearest(name, here if dot else ())
    raise SettingsError(f"{where}{name}: unknown setting{hint or nearest(name, here or setting_names())}")


def _validated(given: Sequence[Given]) -> Settings:
    content: dict[str, dict[str, Any]] = {}
    source: dict[tuple[str, ...], str] = {}
    for one in given:
        content.setdefault(one.section, {})[one.field] = one.value
        source[(one.section, one.field)] = one.source
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError("; and ".join(_sentence(dict(e), source) for e in error.errors())) from error


def _sentence(error: Mapping[str, Any], source: Mapping[tuple[str, ...], str]) -> str:
    """`ppo.steps: must be greater than 0; received -3 (--set)`."""
    where = tuple(str(part) for part in error["loc"])
    rule = re.sub(r"^(Input|Value error,|String) ?(should )?", lambda m: "must " if m[2] else "", error["msg"])
    origin = source.get(where[:2])
    values = "" if len(where) < 2 else f"; received {_shown(error['input'])}"
    # A rule over several sections names them itself.
    place = f"{'.'.join(where[:2])}: " if where else ""
    return f"{place}{rule}{values}{f' ({origin})' if origin else ''}"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _section_class(info: FieldInfo) -> type[Section]:
    if not (isinstance(info.annotation, type) and issubclass(info.annotation, Section)):
        raise TypeError(f"{info.annotation} is no Section")
    return info.annotation


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _is_text(annotation: Any) -> bool:
    """The field holds text or a path, so that `2024` or `true` are taken as they are written."""
    kinds = set(_alternatives(annotation)) - {NoneType}
    return bool(kinds) and all(
        kind in (str, Path)
        or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))
        for kind in kinds
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
