"""The one error of the data pipeline: something about the source the run cannot go on with."""


class DataError(ValueError):
    """The data cannot be used as configured; the message says what, why, and what to set instead.

    It takes one string, so it survives pickling between processes.
    """
