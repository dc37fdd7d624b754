"""The one exception that stands for a mistake the user can repair, and what a user should know without one."""


class VitpruneError(Exception):
    """A mistake of the caller: says where, what is wrong with the value received, and what to do next.

    The command line prints it as one line and exits with code 2; anything else is a bug and keeps its traceback.
    """


class VitpruneNote(UserWarning):
    """A choice that was made for the caller, who may want another: says which, and how to choose.

    A warning in Python; the command line prints it as one line.
    """
