"""Files that commands write, looked at before any work is done."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.errors import UserError


def output_file(flag: str, path: Path, **endings: str) -> Path:
    """``path``, where a file can be written; :class:`UserError` naming the ``flag`` when it cannot be, or when its name
    has another ending than ``endings`` (what each is for: ``png="a grid of pictures"``)."""
    if endings and path.suffix.removeprefix(".") not in endings:
        known = " or ".join(f".{ending} ({use})" if use else f".{ending}" for ending, use in endings.items())
        raise UserError(f"{flag} {path}: the name must end in {known}")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: the folder {path.parent} does not exist")
    from fewstep.files import check_writable

    try:
        check_writable(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: {str(error.strerror).lower()}") from None
    return path
