"""``python -m torch_naiveconv COMMAND``: finds the commands in ``commands/`` and runs one."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

from . import __version__, commands


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_naiveconv")
    parser.description = "Convolution and max-pooling whose every bit the naive loop defines."
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for info in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{info.name}")
        modules[info.name] = module
        text = (module.__doc__ or "").strip()
        command = choices.add_parser(info.name, help=text.split("\n")[0], description=text)
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    return int(modules[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())
