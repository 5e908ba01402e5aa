"""Data sets that come as a program of their own, which ``datasets`` 4 and newer does not run."""

from typing import Any


def script_error(name: Any, error: RuntimeError) -> ValueError:
    """What to raise for an error of ``datasets.load_dataset``: how to mend it, if the data set has a loading script.

    Raises:
        RuntimeError: the error itself, if it is another one.
    """
    if "scripts are no longer supported" not in str(error):
        raise error
    return ValueError(
        f"{name} has a loading script, which `datasets` 4 and newer does not run: {error}. Of many such data sets the "
        "Hub keeps a conversion to parquet, sometimes of a part: revision='refs/convert/parquet' (in a text recipe "
        "data.revision=refs/convert/parquet). Or name a copy in parquet, or files of your own."
    )
