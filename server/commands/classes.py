"""The base classes of commands: their help, their settings, and how they end.

Imports settings only when a command that takes them runs, so that `guanaco --help` answers at once.
"""

from typing import Any, ClassVar

from typer.core import TyperCommand, TyperGroup

from guanaco.server.bootstrap.early import begin_loading_torch
from guanaco.server.commands.common import one_line_errors
from guanaco.server.commands.help import print_help
from guanaco.server.commands.streams import end_interrupted, end_unwritable

HELP_FLAGS = ["-h", "--help"]


class Command(TyperCommand):
    """A command whose help is easy to read."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (typer prints its help as well)
        """Print the help to standard output."""
        print_help(self, ctx, parameters=self.get_params(ctx))


class SettingsCommand(Command):
    """A command that has every setting as an option, besides its own options."""

    shown: ClassVar[frozenset[str] | None] = None  # panels of settings in its help; None: all

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options. Unless they only ask for help, torch's library is opened meanwhile."""
        if not any(flag in args for flag in HELP_FLAGS):
            begin_loading_torch()
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own parameters, then the settings, then `--help`."""
        from guanaco.server.commands.setting_options import setting_options

        own = super().get_params(ctx)
        return [*self.params, *setting_options(), *own[len(self.params) :]]

    def invoke(self, ctx: Any) -> Any:
        """Read the settings, then run the command's function, unless the settings are only to be printed."""
        from guanaco.server.commands.setting_options import read_settings

        return super().invoke(ctx) if read_settings(ctx) else None

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (as above)
        """Print the help without the panels of settings that do not matter to this command."""
        parameters = [p for p in self.get_params(ctx) if not p.rich_help_panel or self._shows(p.rich_help_panel)]
        print_help(self, ctx, parameters=parameters)

    def _shows(self, panel: str) -> bool:
        return self.shown is None or panel in self.shown


class OfflineCommand(SettingsCommand):
    """A command that needs a model but serves no requests. It accepts all of a server's settings, so that one settings
    file serves for both."""

    shown = frozenset({"Model", "Adapters", "CPU and GPU", "Batches and context"})

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.epilog = "All other options of `guanaco serve` are accepted too."


class Group(TyperGroup):
    """A group of commands whose help is easy to read."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (as above)
        """Print the help to standard output."""
        below = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        print_help(self, ctx, below=[c for c in below if c and not c.hidden], parameters=self.get_params(ctx))


class Program(Group):
    """`guanaco` itself. Every command ends with one line for an error of the operator, for Ctrl-C and for a full
    disk."""

    def invoke(self, ctx: Any) -> Any:
        """Run the named command. Raises SystemExit in these cases."""
        try:
            with one_line_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # the library would say "Aborted!" and exit with 1
            end_interrupted()
        except OSError as error:
            end_unwritable(error)


class BenchGroup(Group):
    """`guanaco bench --json` is short for `guanaco bench engine --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `engine` if no sub-command is named."""
        is_short = not args or (args[0].startswith("-") and args[0] not in HELP_FLAGS)
        return super().parse_args(ctx, ["engine", *args] if is_short else args)
