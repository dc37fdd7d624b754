"""The one exception that stands for a mistake the user can repair."""


class VitpruneError(Exception):
    """A mistake of the caller: says where, what is wrong with the value received, and what to do next.

    The command line prints it as one line and exits with code 2; anything else is a bug and keeps its traceback.
    """
