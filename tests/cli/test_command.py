"""The command: what it dispatches to, and how it fails."""

import subprocess
import sys

import pytest

from lightning_tricks.cli import command, main
from lightning_tricks.errors import DataError


def test_help_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in command.COMMANDS)


def test_every_command_can_be_imported():
    for module, function, _ in command.COMMANDS.values():
        imported = __import__(f"lightning_tricks.cli.{module}", fromlist=[function])
        assert callable(getattr(imported, function))


def test_unknown_command_names_the_nearest(refused):
    assert "`demp` is not a command" in refused("demp")
    assert "Did you mean `demo`?" in refused("demp")


@pytest.fixture
def failing(monkeypatch):
    """Let `list` raise what a configuration parser makes of an error in a constructor."""

    def fail(arguments):
        try:
            raise DataError("column `text` is missing")
        except DataError as error:
            raise ValueError("Does not validate against any of the Union subtypes") from error

    monkeypatch.setattr("lightning_tricks.cli.listing.list_tricks", fail)


def test_error_of_ours_is_found_behind_the_parser(failing, refused):
    assert refused("list") == "lightning-tricks: column `text` is missing\n"


def test_error_says_which_process_it_is_from(failing, refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused("list").startswith("lightning-tricks (process 1): ")


def test_debug_shows_the_traceback(failing, monkeypatch):
    with pytest.raises(ValueError, match="Union"):
        main(["list", "--debug"])
    monkeypatch.setenv("LIGHTNING_TRICKS_DEBUG", "1")
    with pytest.raises(ValueError, match="Union"):
        main(["list"])


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr("lightning_tricks.cli.listing.list_tricks", fail)
    with pytest.raises(KeyError):
        main(["list"])


def test_interrupt_ends_cleanly(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_tricks.cli.listing.list_tricks", interrupt)
    assert main(["list"]) == 130


def test_python_m_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "lightning_tricks", "--version"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout.startswith("lightning-tricks ")
