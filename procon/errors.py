"""The one exception that a user is expected to meet."""


class ProConError(ValueError):
    """Bad input or an impossible set-up: one line that names the thing and the remedy.

    The command line prints the line alone and exits with code 2; from Python it is a ``ValueError``.
    """
