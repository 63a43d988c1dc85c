"""The error that the command line reports in one line."""


class ConversionError(ValueError):
    """A mistake of the user's, or something their machine lacks; not a fault of the program.

    The message says what was received, why that cannot work and what to do. The command line
    prints it alone and exits with code 2.
    """
