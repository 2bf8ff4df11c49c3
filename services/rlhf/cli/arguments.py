"""The command line: which verb, which settings it gives. Every option comes from a settings field and its docstring."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.cli.verbs import BY_NAME, VERBS, Verb, named_by
from rlhf.errors import SettingsError

HELP = """\
usage: rlhf VERB [options]          rlhf VERB --help explains every option

RLHF in three steps, as services: language model, reward model, PPO.

{verbs}

Every verb takes --config FILE.toml, --set section.field=value and --run NAME; every setting also has an environment
variable, RLHF_<SECTION>_<FIELD>. Later ones win: defaults < files < environment < --set < a verb's own options.
"""


@dataclass(frozen=True)
class Arguments:
    """A command line, not yet checked against the settings' rules."""

    verb: Verb
    files: tuple[Path, ...] = ()
    """TOML or JSON, later ones win."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` each."""
    flags: dict[str, str] = field(default_factory=dict)
    """From `section.field` to text."""
    fresh: bool = False
    """Start the run over."""
    annotate: bool = False
    """People judge in the demo."""


def parse(argv: Sequence[str]) -> Arguments:
    """
    Raises:
        SettingsError: no such verb, an unknown option, or an option without its value.
        SystemExit: after --help (0).
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs=_listed(VERBS)))
        raise SystemExit(0)
    name = named_by(argv)
    if not name:
        return _parse_group(argv)
    return _parse_verb(BY_NAME[name], argv[len(name.split()) :])


def _parse_group(argv: Sequence[str]) -> NoReturn:
    """`rlhf feedback` and `rlhf feedback --help`, or no verb at all."""
    group = [verb for verb in VERBS if verb.name.startswith(f"{argv[0]} ")]
    if not group:
        raise SettingsError(f"{argv[0]}: no such verb{_nearest(argv[0], BY_NAME)}")
    if len(argv) == 1 or argv[1] in ("-h", "--help", "help"):
        print(f"rlhf {argv[0]} is one of\n\n{_listed(group)}")
        raise SystemExit(0)
    name = f"{argv[0]} {argv[1]}"
    raise SettingsError(f"{name}: no such verb{_nearest(name, [verb.name for verb in group], cutoff=0)}")


def _listed(verbs: Sequence[Verb]) -> str:
    return "\n".join(f"  {verb.name:<17} {verb.help}" for verb in verbs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parse_verb(verb: Verb, argv: Sequence[str]) -> Arguments:
    parser = _parser(verb)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise SettingsError(f"{unknown[0]}: unknown option{_nearest(unknown[0].partition('=')[0], options)}")
    given = vars(found)
    files = [Path(one) for one in given.pop("files")]
    if verb.name == "run":
        files.insert(0, Path(given.pop("positional_config")))
    fresh, annotate = given.pop("fresh", False), given.pop("annotate", False)
    overrides = tuple(given.pop("overrides"))
    return Arguments(verb, tuple(files), overrides, given, fresh, annotate)


def _parser(verb: Verb) -> _Parser:
    parser = _Parser(
        prog=f"rlhf {verb.name}",
        usage=f"rlhf {verb.name}{' CONFIG' if verb.name == 'run' else ''} [options]",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=_epilog(verb),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if verb.name == "run":
        parser.add_argument("positional_config", metavar="CONFIG", help="TOML file that describes the run")
    parser.add_argument(
        "--config", dest="files", metavar="FILE", action="append", default=[], help="TOML file of settings; repeatable"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        action="append",
        default=[],
        help="any one setting; repeatable",
    )
    parser.add_argument(
        "--run", dest="run.name", metavar="NAME", default=argparse.SUPPRESS, help="name of the run (run.name)"
    )
    if verb.kind == "run":
        parser.add_argument("--fresh", action="store_true", help="remove what the run has done so far, and start over")
    if verb.name == "demo":
        parser.add_argument("--annotate", action="store_true", help="rank by hand, on a page that it serves")
    _add_fields(parser, verb)
    return parser


def _add_fields(parser: argparse.ArgumentParser, verb: Verb) -> None:
    group = parser.add_argument_group(f"settings [{verb.section}]")
    for name, info in _fields(verb.section):
        if verb.options and name not in verb.options:
            continue
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if info.annotation is bool else {}
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"{verb.section}.{name}",
            metavar=_metavar(info.annotation),
            default=argparse.SUPPRESS,
            help=_explained(info).replace("%", "%%"),
            **switch,
        )


def _epilog(verb: Verb) -> str:
    lines: list[str] = []
    for section in verb.reads:
        lines += ["", f"also read, given with --set: [{section}]"]
        for name, info in _fields(section):
            text = f"{section}.{name}={_metavar(info.annotation)}  {_explained(info)}"
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _fields(section: str) -> Iterator[tuple[str, FieldInfo]]:
    from rlhf.settings.loader import sections

    return iter(sections()[section].model_fields.items())


def _explained(info: FieldInfo) -> str:
    """`Optimisation steps. [40]`"""
    text = " ".join((info.description or "").split())
    default = "" if info.default is None else f" [{_default(info.default)}]"
    return text + default


def _default(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value) or "empty"
    return json.dumps(value, default=str)


def _metavar(annotation: Any) -> str:
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in alternatives]
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is tuple:
        return "LIST"
    named = {int: "INT", float: "NUMBER", bool: "BOOL", Path: "PATH", str: "TEXT"}
    return next((named[kind] for kind in kinds if kind in named), "VALUE")


def _nearest(name: str, candidates: Any, cutoff: float = 0.6) -> str:
    from rlhf.settings.loader import nearest

    return nearest(name, candidates, cutoff)
