"""How commands fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..errors import PrivateSettings


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show what is wrong with a configuration, without a traceback."""
    try:
        yield
    except (ValueError, PrivateSettings) as error:
        raise click.ClickException(str(error)) from error
