"""Command line: `ospq-export calibrate | export | validate | demo`, a module per command.

Heavy imports happen inside the commands, so that --help answers at once. Exit status: 0 done (validate: the
deployment is faithful and accuracy is kept), 1 validate refuted one of the two, 2 the input was bad, 3 validate saw
too few images to tell, 130 interrupted.
"""

from ospq_export.cli.app import main

__all__ = ["main"]
