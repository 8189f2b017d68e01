"""The command line as flags of a verb; what is wrong with it is said in one line, with the nearest right thing."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from llm3.cli.flags import PROCESSES, Flag, Verb
from llm3.cli.verbs import VERBS
from llm3.errors import UserError, closest, nearest

OF_CONFIG = "--config."  # the beginning of an override of a field


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.partition(" ")[2]
        help_ = f"python -m llm3 {verb} --help".replace("  ", " ")
        raise UserError(f"{verb or 'llm3'}: {message}; see {help_}")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs and their flags."""
    top = _Parser(prog="llm3", description="Language models in three stages.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        epilog = "--config.FIELD=VALUE sets a field of the config"
        own = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False, epilog=epilog)
        for flag_name, options in flags_of(verb):
            own.add_argument(*names_of(flag_name), **options)
    return top


def flags_of(verb: Verb) -> tuple[Flag, ...]:
    """The flags of a verb."""
    return (*verb.flags, *(PROCESSES if verb.clustered else ()))


def names_of(flag: str) -> list[str]:
    """A flag and its other spelling: --stage and --stages are the same."""
    return [flag, *{"--stage": ["--stages"], "--stages": ["--stage"]}.get(flag, [])]


def read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The verb, its flags by name, and the overrides of the config, "FIELD=VALUE". Raises UserError."""
    overrides = [each.removeprefix(OF_CONFIG) for each in arguments if each.startswith(OF_CONFIG)]
    rest = [each for each in arguments if not each.startswith(OF_CONFIG)]
    check_words(rest)
    options = vars(parser().parse_args(rest))
    return options.pop("verb"), options, overrides


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for an unknown verb, or for a flag that the verb does not have."""
    if not words:
        raise UserError(f"expected a verb: {', '.join(VERBS)}; see python -m llm3 --help")
    verb = words[0]
    if verb.startswith("-"):
        return
    if verb not in VERBS:
        raise UserError(f"no such verb {verb!r}: {nearest(verb, VERBS)}")
    own = ["--help", *(name for flag, _ in flags_of(VERBS[verb]) for name in names_of(flag))]
    for word in words[1:]:
        name = word.partition("=")[0]
        if name.startswith("--") and name != "--" and name not in own:
            raise UserError(f"{name}: no such flag of {verb}; {_where_else(name, own)}")


def _where_else(name: str, own: list[str]) -> str:
    having = [other for other, each in VERBS.items() if any(name in names_of(flag) for flag, _ in flags_of(each))]
    if having:
        return f"{', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    return f"{closest(name, own)}valid: {', '.join(own)}"
