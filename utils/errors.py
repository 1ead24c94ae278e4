"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input or environment; the message names the cause and the cure. Entry points print it and exit with 2."""
