"""Modules whose extra dependencies are missing have no doctests to run."""

from importlib.util import find_spec

collect_ignore = []
if not (find_spec("matplotlib") and find_spec("PIL")):
    collect_ignore.append("torch_naiveconv/pages/pictures.py")
