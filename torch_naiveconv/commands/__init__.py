"""The commands of ``python -m torch_naiveconv``, one file each.

A command is a module whose docstring is its help, with ``add_arguments(parser)`` and
``run(arguments) -> exit status``. A new file is a new command.
"""
