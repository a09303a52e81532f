"""The datasets library logs errors that it also raises."""


def say_nothing() -> None:
    """No progress bars and no log, from now on.

    A file that cannot be read is logged as an error by the builder (packaged_modules/parquet/parquet.py) and then
    raised: the user would read it twice, once without our line's place and remedy. Seen with datasets 5.2.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
