"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """Something the user can mend; the command line prints it and exits with status 2.

    The message is one line that names the key, file or value and says what would be right.
    """
